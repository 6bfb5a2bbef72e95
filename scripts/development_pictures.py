"""Pictures and short videos for the development pipelines, drawn from a description.

Each word for a colour belongs to one thing in a scene, so that a small model need not learn what it refers to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from train_demo_pipeline import COLOURS as PAINTS  # type: ignore[import-not-found]  # beside it
from train_demo_pipeline import IMAGE_SIZE, SUPERSAMPLING

Colour = tuple[int, ...]

#: The colours of landscapes are some that the demo's VAE has learned.
SKIES = {"azure": PAINTS["blue"], "violet": PAINTS["purple"], "pale": PAINTS["white"], "night": PAINTS["black"]}
SUNS = {"gold": PAINTS["yellow"], "scarlet": PAINTS["red"], "amber": PAINTS["orange"], "silver": PAINTS["gray"]}
ROCKS = {"slate": PAINTS["gray"], "brick": PAINTS["red"], "coal": PAINTS["black"], "mossy": PAINTS["green"]}
PLAINS = {"grassy": PAINTS["green"], "sandy": PAINTS["yellow"], "snowy": PAINTS["white"], "rusty": PAINTS["orange"]}
SIDES = {"on the left": 15, "in the middle": 32, "on the right": 49}
RIDGES = ("jagged", "rolling", "stepped")

WALLS = {"ivory": (240, 230, 200), "pink": (240, 130, 170), "navy": (30, 40, 110), "olive": (120, 130, 50)}
ROOFS = {"crimson": (190, 20, 50), "teal": (0, 130, 130), "brown": (110, 70, 40), "lilac": (180, 150, 220)}
AIRS = {"cloudy": (190, 195, 205), "turquoise": (80, 210, 220), "dusky": (70, 50, 100), "peach": (250, 190, 150)}
ROOF_FORMS = ("pointed", "flat", "round")
TREES = ("pine", "oak")
TREE_SIDES = {"on the left": 12, "on the right": 52}
MEADOW, LEAVES, TRUNK = (90, 160, 70), (30, 100, 50), (100, 70, 50)

BALLS = {"ruby": (200, 20, 60), "lemon": (250, 230, 60), "jet": (25, 25, 30), "cobalt": (30, 80, 200)}
CURTAINS = {"rose": (240, 170, 180), "lime": (170, 220, 80), "ash": (150, 155, 160), "cream": (250, 240, 210)}
FLOORS = {"wooden": (150, 100, 60), "stone": (90, 90, 100), "marble": (225, 225, 230), "plum": (110, 50, 90)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
VIDEO_SIZE, FRAMES = 48, 9


class Scene(Protocol):
    """What one picture or video shows."""

    def describe(self) -> str:
        """The caption."""

    def draw(self, rng: random.Random) -> list[Image.Image]:
        """One image, or the frames of a video; places, sizes and colours vary a little."""


@dataclass(frozen=True)
class Landscape:
    """A sun in the sky above mountains and a plain; every colour word belongs to one of the four."""

    sky: str
    sun: str
    side: str
    ridge: str
    rock: str
    plain: str

    @classmethod
    def sample(cls, rng: random.Random) -> Landscape:
        sky, sun, rock, plain = (rng.choice(list(palette)) for palette in (SKIES, SUNS, ROCKS, PLAINS))
        return cls(sky, sun, rng.choice(list(SIDES)), rng.choice(RIDGES), rock, plain)

    def describe(self) -> str:
        return f"{self.sun} sun {self.side} over {self.ridge} {self.rock} mountains, {self.plain} plain, {self.sky} sky"

    def draw(self, rng: random.Random) -> list[Image.Image]:
        canvas = Canvas(IMAGE_SIZE, vary(SKIES[self.sky], rng))
        x, y, radius = SIDES[self.side] + rng.uniform(-2, 2), 16 + rng.uniform(-2, 2), 8 * rng.uniform(0.9, 1.1)
        canvas.disc(x, y, radius, vary(SUNS[self.sun], rng))
        ridge, plain = ridge_line(self.ridge, rng), 48 + rng.uniform(-1, 1)
        canvas.polygon([*ridge, (IMAGE_SIZE, IMAGE_SIZE), (0, IMAGE_SIZE)], vary(ROCKS[self.rock], rng))
        canvas.box(0, plain, IMAGE_SIZE, IMAGE_SIZE, vary(PLAINS[self.plain], rng))
        return [canvas.image()]


@dataclass(frozen=True)
class House:
    """A house beside a tree on a meadow."""

    wall: str
    form: str
    roof: str
    tree: str
    side: str
    air: str

    @classmethod
    def sample(cls, rng: random.Random) -> House:
        wall, roof, air = (rng.choice(list(palette)) for palette in (WALLS, ROOFS, AIRS))
        return cls(wall, rng.choice(ROOF_FORMS), roof, rng.choice(TREES), rng.choice(list(TREE_SIDES)), air)

    def describe(self) -> str:
        return f"{self.wall} house with a {self.form} {self.roof} roof, {self.tree} tree {self.side}, {self.air} sky"

    def draw(self, rng: random.Random) -> list[Image.Image]:
        canvas = Canvas(IMAGE_SIZE, vary(AIRS[self.air], rng))
        ground, tree = 52 + rng.uniform(-1, 1), TREE_SIDES[self.side] + rng.uniform(-1, 1)
        canvas.box(0, ground, IMAGE_SIZE, IMAGE_SIZE, vary(MEADOW, rng))
        canvas.box(tree - 2, ground - 12, tree + 2, ground + 2, vary(TRUNK, rng))
        if self.tree == "pine":
            canvas.polygon([(tree - 9, ground - 6), (tree, ground - 34), (tree + 9, ground - 6)], vary(LEAVES, rng))
        else:
            canvas.disc(tree, ground - 18, 9, vary(LEAVES, rng))
        left = (40 if tree < IMAGE_SIZE / 2 else 24) - 15 + rng.uniform(-1, 1)
        right, top = left + 30, ground - 22 + rng.uniform(-1, 1)
        draw_roof(canvas, self.form, (left - 2, right + 2, top), vary(ROOFS[self.roof], rng))
        canvas.box(left, top, right, ground + 3, vary(WALLS[self.wall], rng))
        return [canvas.image()]


def draw_roof(canvas: Canvas, form: str, place: tuple[float, float, float], colour: Colour) -> None:
    """A roof from `left` to `right` that stands on `top`, in pixels."""
    left, right, top = place
    if form == "pointed":
        canvas.polygon([(left, top), ((left + right) / 2, top - 17), (right, top)], colour)
    elif form == "flat":
        canvas.box(left, top - 7, right, top, colour)
    else:
        canvas.disc((left + right) / 2, top, (right - left) / 2 - 3, colour)


@dataclass(frozen=True)
class Flight:
    """A ball that crosses the picture above a floor.

    Attributes:
        radius: mean radius of the ball, in pixels
        rise: how far the floor rises from the first frame to the last, in pixels
    """

    ball: str
    direction: str
    floor: str
    curtain: str
    radius: float = 6
    rise: float = 0

    @classmethod
    def sample(cls, rng: random.Random) -> Flight:
        ball, floor, curtain = (rng.choice(list(palette)) for palette in (BALLS, FLOORS, CURTAINS))
        return cls(ball, rng.choice(list(DIRECTIONS)), floor, curtain)

    @classmethod
    def sample_rising(cls, rng: random.Random) -> Flight:
        """A flight over a rising floor, by which a small model can tell the frames apart.

        Wan's transformer knows only how far frames are from each other (RoPE). Where nothing but the ball moved, balls
        vanished or doubled, as if a small one could not tell the first frame from the last.
        """
        return replace(cls.sample(rng), radius=7, rise=18)

    def describe(self) -> str:
        return f"{self.ball} ball moving {self.direction}, {self.floor} floor, {self.curtain} curtain"

    def draw(self, rng: random.Random) -> list[Image.Image]:
        curtain, ball, floor = (
            vary(CURTAINS[self.curtain], rng),
            vary(BALLS[self.ball], rng),
            vary(FLOORS[self.floor], rng),
        )
        radius, edge = self.radius * rng.uniform(0.9, 1.1), 37 + rng.uniform(-1, 1)
        across, down = DIRECTIONS[self.direction]
        x, y = 24 - 15 * across + rng.uniform(-1, 1), 19 - 10 * down + rng.uniform(-1, 1)
        frames = []
        for frame in range(FRAMES):
            moved = frame / (FRAMES - 1)
            canvas = Canvas(VIDEO_SIZE, curtain)
            canvas.box(0, edge + self.rise * (0.4 - moved), VIDEO_SIZE, VIDEO_SIZE, floor)
            canvas.disc(x + 30 * across * moved, y + 20 * down * moved, radius, ball)
            frames.append(canvas.image())
        return frames


class Canvas:
    """A square that is painted at a multiple of its size; all places are in its own pixels."""

    def __init__(self, size: int, colour: Colour) -> None:
        self._size = size
        self._image = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), colour)
        self._draw = ImageDraw.Draw(self._image)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse([SUPERSAMPLING * edge for edge in box], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self._draw.rectangle([SUPERSAMPLING * edge for edge in (left, top, right, bottom)], colour)

    def polygon(self, corners: Iterable[tuple[float, float]], colour: Colour) -> None:
        self._draw.polygon([(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in corners], colour)

    def image(self) -> Image.Image:
        return self._image.resize((self._size, self._size), Image.Resampling.LANCZOS)


def ridge_line(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """The upper edge of a ridge, from left to right, in pixels."""
    phase, period = rng.uniform(0, 16), 16
    points = []
    for x in range(IMAGE_SIZE + 1):
        along = ((x + phase) % period) / period
        height = {"jagged": 1 - abs(2 * along - 1), "rolling": 0.5 - 0.5 * math.cos(2 * math.pi * along)}.get(kind)
        points.append((float(x), 44 - 12 * (float(along > 0.5) if height is None else height)))
    return points


def vary(colour: Colour, rng: random.Random) -> Colour:
    return tuple(max(0, min(255, channel + rng.randint(-8, 8))) for channel in colour)


@dataclass(frozen=True)
class Pictures:
    """Scenes of one kind, without those whose captions are kept back."""

    sample: Callable[[random.Random], Scene]
    held_out: frozenset[str] = frozenset()

    def scene(self, rng: random.Random, taken: Iterable[str] = ()) -> Scene:
        """A scene whose caption is neither held out nor taken."""
        while (scene := self.sample(rng)).describe() in self.held_out or scene.describe() in taken:
            pass
        return scene

    def draw(self, rng: random.Random, count: int, every: int = 1) -> tuple[list[str], torch.Tensor]:
        """Captions, and frames in [-1, 1] as float32 [count, frames, 3, height, width].

        Args:
            every: takes only every so many frames, the first among them
        """
        scenes = [self.scene(rng) for _ in range(count)]
        videos = np.stack([np.stack([np.asarray(frame) for frame in scene.draw(rng)[::every]]) for scene in scenes])
        return [scene.describe() for scene in scenes], torch.from_numpy(videos).permute(0, 1, 4, 2, 3) / 127.5 - 1.0
