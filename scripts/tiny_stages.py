"""Tiny repositories of transformers with several stages: real classes with fixed random weights, and files beside them.

Some have a class in no package, so that their tensors have the names that vLLM-Omni's loader reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

__all__ = ["REPOSITORIES", "save_repository"]

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
LANGUAGE_MODEL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": ROPE,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "d_model": 32,
    "output_dim": 64,
    "n_window": 10,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
DECODER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
CHARACTERS = [chr(code) for code in range(32, 127)]
#: Name of a special token in the processors of transformers → its text; they follow the characters in the vocabulary.
SPECIAL_TOKENS = {
    f"{name}_token": f"<|{name}|>"
    for name in ("image", "video", "audio", "vision_bos", "vision_eos", "audio_bos", "audio_eos")
}
#: The same, as the configs of the thinkers number them.
_NUMBERS = {name.removesuffix("_token"): number for number, name in enumerate(SPECIAL_TOKENS, len(CHARACTERS) + 1)}
THINKER_TOKENS = {
    "vision_start_token_id": _NUMBERS["vision_bos"],
    "vision_end_token_id": _NUMBERS["vision_eos"],
    "audio_start_token_id": _NUMBERS["audio_bos"],
    "audio_end_token_id": _NUMBERS["audio_eos"],
    **{f"{name}_token_{end}": _NUMBERS[name] for name in ("image", "video", "audio") for end in ("id", "index")},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|image|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|audio|><|audio_eos|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
#: Settings of the processors of images and sounds.
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "video_processor_type": "Qwen2VLVideoProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 32 * 32,
    "max_pixels": 64 * 64,
    "feature_size": AUDIO["num_mel_bins"],
}
#: Files of such repositories that a conversion takes over as they are.
OTHER_FILES = {
    "generation_config.json": b'{"do_sample": true}',
    "preprocessor_config.json": b"{}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "modeling_custom.py": b'raise RuntimeError("never run")\n',
    "LICENSE": b"a license\n",
    "spk_dict.pt": b"\x80 a pickle that nobody reads",
    "speech_tokenizer/config.json": b'{"model_type": "codec"}',
    "speech_tokenizer/model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
}
#: Name of the family → files of its processor, which take the place of those.
PROCESSOR_FILES = {
    name: {
        "preprocessor_config.json": json.dumps({**PREPROCESSOR, "processor_class": kind, "patch_size": patch}).encode(),
        "chat_template.json": json.dumps({"chat_template": CHAT_TEMPLATE}).encode(),
    }
    for name, kind, patch in (
        ("qwen_3_omni", "Qwen3OmniMoeProcessor", 16),
        ("qwen_2_5_omni", "Qwen2_5OmniProcessor", 14),
    )
}


def qwen_3_omni() -> transformers.PreTrainedModel:
    talker = {**LANGUAGE_MODEL, **EXPERTS, "num_hidden_layers": 1, "num_local_experts": 4}
    return _built(
        transformers.Qwen3OmniMoeForConditionalGeneration,
        transformers.Qwen3OmniMoeConfig(
            thinker_config={
                **THINKER_TOKENS,
                "text_config": {**LANGUAGE_MODEL, **EXPERTS},
                "audio_config": {**AUDIO, "downsample_hidden_size": 16, "n_window": 50, "n_window_infer": 100},
                "vision_config": {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            },
            talker_config={
                "text_config": {**talker, "shared_expert_intermediate_size": 32},
                "code_predictor_config": {**DECODER, "num_key_value_heads": 2, "head_dim": 16, "num_code_groups": 4},
                "thinker_hidden_size": 64,
                "num_code_groups": 4,
                "spatial_merge_size": 2,
            },
            code2wav_config={
                **DECODER,
                "codebook_size": 64,
                "num_key_value_heads": 4,
                "upsample_rates": [2],
                "upsampling_ratios": [2],
                "decoder_dim": 32,
                "num_quantizers": 4,
            },
        ),
    )


def qwen_2_5_omni() -> transformers.PreTrainedModel:
    vision = {**VISION, "hidden_size": 32, "fullatt_block_indexes": [0]}
    return _built(
        transformers.Qwen2_5OmniForConditionalGeneration,
        transformers.Qwen2_5OmniConfig(
            thinker_config={
                **THINKER_TOKENS,
                "text_config": LANGUAGE_MODEL,
                "audio_config": AUDIO,
                "vision_config": vision,
            },
            talker_config={**LANGUAGE_MODEL, "num_hidden_layers": 1, "embedding_size": 64},
            token2wav_config={
                "dit_config": {
                    "hidden_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "head_dim": 32,
                    "emb_dim": 16,
                    "enc_emb_dim": 16,
                    "enc_dim": 8,
                    "enc_channels": [16, 16, 16, 16, 48],
                    "enc_attention_channels": 8,
                    "enc_se_channels": 8,
                    "num_embeds": 32,
                    "mel_dim": 16,
                },
                "bigvgan_config": {
                    "mel_dim": 16,
                    "upsample_initial_channel": 32,
                    "upsample_rates": [2, 2],
                    "upsample_kernel_sizes": [4, 4],
                },
            },
        ),
    )


def _built(model_class: Any, config: transformers.PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        # transformers leaves the talker's stacked experts uninitialized: whatever is in memory there may be NaN.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
    return model.to(torch.bfloat16)


def _attention(block: str, end: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the linears of an attention of four heads, two of them for keys."""
    return {f"{block}.self_attn.{leaf}_proj{end}": (32 if leaf in "kv" else 64, 64) for leaf in "qkvo"}


def _mlp(block: str, end: str = "") -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    return {f"{block}.mlp{end}.{leaf}_proj": shape for leaf, shape in shapes.items()}


#: The talker of Qwen3-TTS encodes the voices that it imitates with Mimi,
CODEC: dict[str, Any] = {
    **DECODER,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "upsample_groups": 64,
    "codebook_size": 16,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 4,
    "num_key_value_heads": 4,
}
#: and with an ECAPA-TDNN.
SPEAKER: dict[str, Any] = {
    "mel_dim": 16,
    "enc_dim": 48,
    "enc_channels": [16, 16, 16],
    "enc_kernel_sizes": [5, 3, 1],
    "enc_dilations": [1, 2, 1],
    "enc_attention_channels": 8,
    "enc_res2net_scale": 2,
    "enc_se_channels": 8,
}


def _save_qwen_3_tts(folder: Path) -> None:
    """A talker, a code predictor, and the modules beside them, under the names that vLLM-Omni's loader reads."""
    # Imports torchvision, before which vllm_omni_runtime.py declares operators.
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import ECAPA_TimeDelayNet

    shapes: dict[str, tuple[int, ...]] = {
        "talker.codec_head": (96, 64),
        "talker.model.codec_embedding": (96, 64),
        "talker.model.text_embedding": (160, 64),
        "talker.text_projection.linear_fc1": (64, 64),
        "talker.text_projection.linear_fc2": (64, 64),
        "talker.model.norm": (64,),
        "talker.code_predictor.model.norm": (64,),
    }
    for group in range(3):
        shapes[f"talker.code_predictor.lm_head.{group}"] = (64, 64)
        shapes[f"talker.code_predictor.model.codec_embedding.{group}"] = (64, 64)
    for block in ("talker.model.layers.0", "talker.model.layers.1", "talker.code_predictor.model.layers.0"):
        shapes |= _attention(block) | _mlp(block)
        shapes |= {f"{block}.{norm}_layernorm": (64,) for norm in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{leaf}_norm": (16,) for leaf in "qk"}
    biases: dict[str, tuple[int, ...]] = {f"talker.text_projection.linear_fc{number}": (64,) for number in (1, 2)}
    predictor = {**DECODER, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 16, "num_code_groups": 4}
    talker = {key: value for key, value in LANGUAGE_MODEL.items() if key != "rope_parameters"}
    talker |= {"vocab_size": 96, "text_vocab_size": 160, "text_hidden_size": 64, "code_predictor_config": predictor}
    config = {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "talker_config": {**talker, "num_code_groups": 4},
        "speaker_encoder_config": SPEAKER,
        **{f"tts_{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))},
    }
    weights = _random_weights(shapes) | _random_weights(biases, "bias")
    speaker = _built(ECAPA_TimeDelayNet, transformers.Qwen2_5OmniDiTConfig(**SPEAKER))
    weights |= {f"speaker_encoder.{name}": tensor for name, tensor in speaker.state_dict().items()}
    _save_named(folder, weights, config)


def _save_speech_tokenizer(folder: Path) -> None:
    """The encoder of Qwen3-TTS's codec, in place of the files that other repositories have there."""
    codec = _built(transformers.MimiModel, transformers.MimiConfig(**CODEC))
    decoder = ("upsample.", "decoder_transformer.", "decoder.")
    weights = {f"encoder.{name}": each for name, each in codec.state_dict().items() if not name.startswith(decoder)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3_tts_tokenizer_12hz", "encoder_config": CODEC}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text('{"feature_extractor_type": "EncodecFeatureExtractor"}')


#: HunyuanImage-3.0 as its config.json describes it, but for the parts beside the language model.
HUNYUAN_IMAGE_3: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 16,
    "num_experts": 4,
    "moe_topk": 2,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
    "moe_layer_num_skipped": 0,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
}
BAGEL_LANGUAGE_MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _save_hunyuan_image_3(folder: Path) -> None:
    """Rows of q, k and v in turn for each of two heads of keys; up before gate."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.wte": (160, 64),
        "model.ln_f": (64,),
        "lm_head": (160, 64),
        "vision_model.encoder.layers.0.self_attn.q_proj": (32, 32),
        "vision_model.encoder.layers.0.mlp.fc1": (64, 32),
        "vision_aligner.layers.0": (64, 32),
        "vae.decoder.mid.attn_1.q": (32, 32, 1, 1, 1),
        "patch_embed.model.0": (64, 16, 3, 3),
        "final_layer.model.1.emb_layers.1": (64, 64),
        "timestep_emb.mlp.0": (64, 256),
        "time_embed.mlp.2": (64, 64),
        "time_embed_2.mlp.2": (64, 64),
    }
    for block in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{block}.{norm}_layernorm": (64,) for norm in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{norm}_layernorm": (16,) for norm in ("query", "key")}
        shapes |= {f"{block}.self_attn.qkv_proj": (128, 64), f"{block}.self_attn.o_proj": (64, 64)}
        shapes[f"{block}.mlp.gate.wg"] = (4, 64)
        for mlp in ("shared_mlp", *(f"experts.{number}" for number in range(4))):
            shapes |= {f"{block}.mlp.{mlp}.gate_and_up_proj": (64, 64), f"{block}.mlp.{mlp}.down_proj": (64, 32)}
    config = {"architectures": ["HunyuanImage3ForCausalMM"], "model_type": "hunyuan_image_3_moe", **HUNYUAN_IMAGE_3}
    _save_named(folder, _random_weights(shapes), config)


def _save_bagel(folder: Path) -> None:
    """The layout of the original: the model in one file, its VAE in another, and a config for each part."""
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.lm_head": (160, 64),
        "language_model.model.embed_tokens": (160, 64),
        "vit_model.vision_model.encoder.layers.0.self_attn.q_proj": (32, 32),
        "vit_model.vision_model.encoder.layers.0.mlp.fc1": (64, 32),
        "connector.fc1": (64, 32),
        "connector.fc2": (64, 64),
        "time_embedder.mlp.0": (64, 256),
        "time_embedder.mlp.2": (64, 64),
        "vae2llm": (64, 64),
        "llm2vae": (64, 64),
    }
    biases: dict[str, tuple[int, ...]] = {}
    for expert in ("", "_moe_gen"):
        shapes[f"language_model.model.norm{expert}"] = (64,)
        for block in ("language_model.model.layers.0", "language_model.model.layers.1"):
            shapes |= {f"{block}.{norm}_layernorm{expert}": (64,) for norm in ("input", "post_attention")}
            shapes |= {f"{block}.self_attn.{leaf}_norm{expert}": (16,) for leaf in "qk"}
            attention = _attention(block, expert)
            biases |= {stem: shape[:1] for stem, shape in attention.items() if "o_proj" not in stem}
            shapes |= attention | _mlp(block, expert)
    weights = _random_weights(shapes) | _random_weights(biases, "bias")
    config = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "llm_config": BAGEL_LANGUAGE_MODEL,
        "vae_config": {"z_channels": 16, "downsample": 8},
    }
    _save_named(folder, weights, config, "ema.safetensors")
    vae = _random_weights({"encoder.conv_in": (8, 3, 3, 3), "decoder.conv_out": (3, 8, 3, 3)})
    save_file(vae, folder / "ae.safetensors", metadata={"format": "pt"})
    (folder / "llm_config.json").write_text(json.dumps(BAGEL_LANGUAGE_MODEL))
    (folder / "vit_config.json").write_text(json.dumps({"hidden_size": 32}))


def _random_weights(shapes: dict[str, tuple[int, ...]], leaf: str = "weight") -> dict[str, torch.Tensor]:
    """A tensor STEM.leaf of each shape."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{stem}.{leaf}": torch.randn(shape, generator=generator).to(torch.bfloat16) for stem, shape in shapes.items()
    }


def _save_named(
    folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], file: str = "model.safetensors"
) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _save_hidream_o1(folder: Path) -> None:
    """Qwen3-VL of transformers, and what HiDream-O1 has beside it."""
    text = {**LANGUAGE_MODEL, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
    vision = {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    model = _built(
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False),
    )
    model.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {
        "model.t_embedder1.mlp.0": (64, 256),
        "model.t_embedder1.mlp.2": (64, 64),
        "model.x_embedder.proj1": (16, 3072),
        "model.x_embedder.proj2": (64, 16),
        "model.final_layer2.linear": (3072, 64),
    }
    biased = {stem: shape[:1] for stem, shape in shapes.items() if stem != "model.x_embedder.proj1"}
    file = folder / "model.safetensors"
    shards = {
        "model-00001-of-00002.safetensors": load_file(file),
        "model-00002-of-00002.safetensors": _random_weights(shapes) | _random_weights(biased, "bias"),
    }
    file.unlink()
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save_of_transformers(build: Callable[[], transformers.PreTrainedModel], folder: Path) -> None:
    build().save_pretrained(folder, max_shard_size="300KB")


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each printable character of ASCII, and the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {"\0": 0} | {each: n for n, each in enumerate(CHARACTERS, 1)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", pad_token="?", extra_special_tokens=SPECIAL_TOKENS
    )


#: Name of the family → a function that saves a tiny model of it into a folder.
REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "qwen_3_omni": lambda folder: _save_of_transformers(qwen_3_omni, folder),
    "qwen_2_5_omni": lambda folder: _save_of_transformers(qwen_2_5_omni, folder),
    "qwen_3_tts": _save_qwen_3_tts,
    "hunyuan_image_3": _save_hunyuan_image_3,
    "bagel": _save_bagel,
    "hidream_o1": _save_hidream_o1,
}


def save_repository(name: str, folder: Path) -> None:
    """Saves a tiny repository with all files that real ones have."""
    REPOSITORIES[name](folder)
    _tokenizer().save_pretrained(folder)
    for file, content in (OTHER_FILES | PROCESSOR_FILES.get(name, {})).items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if name == "qwen_3_tts":
        _save_speech_tokenizer(folder / "speech_tokenizer")
