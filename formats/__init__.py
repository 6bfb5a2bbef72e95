"""What the bytes mean: formats, containers, model families, and how runtimes spell them. No pipelines, no commands."""
