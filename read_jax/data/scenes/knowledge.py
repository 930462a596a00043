"""What everybody knows about the things in a scene: their uses, their corners, what looks alike."""

from __future__ import annotations

import dataclasses

from read_jax.data.scenes.shapes import EVERYDAY, PLAIN_SHAPES


@dataclasses.dataclass(frozen=True)
class Use:
    """Something that some things are good for, or a trait that takes knowledge to see.

    Attributes:
        yes, unclear: the shapes it is true of, and those people could disagree about; false of the rest.
        clause: what follows the noun: "thing that could roll away".
        questions: ways to ask for all of them, each with what to say where there is none.
    """

    yes: tuple[str, ...]
    unclear: tuple[str, ...]
    clause: str
    questions: dict[str, str]


USES: dict[str, Use] = {
    "roll": Use(
        ("ball", "wheel"),
        ("circle", "ring", "car", "cup", "bottle"),
        "that could roll away",
        {
            "Which of these could roll away?": "Nothing in this image could roll away.",
            "What would roll down a hill?": "Nothing in this image would roll down a hill.",
        },
    ),
    "drink": Use(
        ("cup", "bottle"),
        (),
        "you could drink from",
        {
            "What could you drink from?": "There is nothing to drink from in this image.",
            "Which of these could hold some water?": "Nothing in this image could hold some water.",
        },
    ),
    "read": Use(
        ("book",),
        (),
        "you could read",
        {
            "What could you read?": "There is nothing to read in this image.",
            "Which of these has pages to turn?": "Nothing in this image has pages to turn.",
        },
    ),
    "live": Use(
        ("house",),
        (),
        "a family could live in",
        {
            "Where could a family live?": "There is nowhere to live in this image.",
            "Which of these do people live in?": "There is nothing to live in in this image.",
        },
    ),
    "light": Use(
        ("lamp",),
        ("star",),
        "you could turn on in the dark",
        {
            "What would you turn on in the dark?": "There is nothing to turn on in the dark in this image.",
            "Which of these gives light to read by?": "Nothing in this image gives light to read by.",
        },
    ),
    "swim": Use(
        ("fish",),
        (),
        "that can swim",
        {
            "What can breathe under water?": "Nothing in this image can breathe under water.",
            "Which of these can swim?": "Nothing in this image can swim.",
        },
    ),
    "drive": Use(
        ("car",),
        (),
        "you could drive",
        {
            "What could you drive to work?": "There is nothing to drive in this image.",
            "Which of these belongs on the road?": "Nothing in this image belongs on the road.",
        },
    ),
    "sail": Use(
        ("boat",),
        (),
        "you could sail in",
        {
            "What could take you across a lake?": "Nothing in this image could take you across a lake.",
            "Which of these needs wind to move?": "Nothing in this image needs wind to move.",
        },
    ),
    "sit": Use(
        ("chair",),
        ("car", "boat"),
        "you could sit on",
        {
            "What could you sit on?": "There is nothing to sit on in this image.",
            "Where could you rest your legs?": "There is nowhere to rest your legs in this image.",
        },
    ),
    "grow": Use(
        ("tree",),
        (),
        "that has leaves",
        {
            "What has leaves and roots?": "Nothing in this image has leaves and roots.",
            "Where would a bird build a nest?": "There is nowhere to build a nest in this image.",
        },
    ),
    "alive": Use(
        ("fish", "tree"),
        (),
        "that is alive",
        {
            "Which of these is alive?": "Nothing in this image is alive.",
            "What is a living thing?": "There is no living thing in this image.",
        },
    ),
    "play": Use(
        ("ball",),
        ("circle", "wheel", "ring", "car", "boat"),
        "you could kick in a game",
        {
            "What could you kick in a game?": "There is nothing to kick in a game in this image.",
            "Which of these would bounce?": "Nothing in this image would bounce.",
        },
    ),
    "travel": Use(
        ("car", "boat"),
        ("wheel",),
        "you could travel in",
        {
            "What could take you on a trip?": "Nothing in this image could take you on a trip.",
            "Which of these could you travel in?": "There is nothing to travel in in this image.",
        },
    ),
    "shine": Use(
        ("star",),
        ("circle", "lamp", "diamond"),
        "that could be in the night sky",
        {
            "Which one could be in the night sky?": "Nothing in this image could be in the night sky.",
            "What do people wish upon at night?": "There is nothing to wish upon at night in this image.",
        },
    ),
    "hole": Use(
        ("ring",),
        ("wheel", "cup", "chair", "book"),
        "with a hole in the middle",
        {
            "Which one has a hole in the middle?": "Nothing in this image has a hole in the middle.",
            "What could you put on a finger?": "There is nothing to put on a finger in this image.",
        },
    ),
    "no corners": Use(
        ("circle", "ring"),
        tuple(EVERYDAY),
        "with no corners",
        {
            "Which of these has no corners?": "Nothing in this image has no corners.",
            "Which shape is round?": "No shape in this image is round.",
        },
    ),
    "three sides": Use(
        ("triangle",),
        ("house", "boat"),
        "with three sides",
        {
            "Which shape has three sides?": "No shape in this image has three sides.",
            "What has exactly three corners?": "Nothing in this image has exactly three corners.",
        },
    ),
    "four corners": Use(
        ("square", "diamond"),
        tuple(EVERYDAY),
        "with four corners",
        {
            "Which of these has four corners?": "Nothing in this image has four corners.",
            "What has exactly four sides?": "Nothing in this image has exactly four sides.",
        },
    ),
    "six sides": Use(
        ("hexagon",),
        tuple(EVERYDAY),
        "with six sides",
        {
            "Which shape has six sides?": "No shape in this image has six sides.",
            "What has exactly six corners?": "Nothing in this image has exactly six corners.",
        },
    ),
}

CORNERS: dict[str, tuple[int, int]] = {
    "circle": (0, 0),
    "ring": (0, 0),
    "triangle": (3, 3),
    "square": (4, 4),
    "diamond": (4, 4),
    "star": (5, 10),
    "hexagon": (6, 6),
    "cross": (12, 12),
}
"""How many corners, from and to: of a star some count the tips, some the notches too."""
assert set(CORNERS) == set(PLAIN_SHAPES)

CONFUSABLE = frozenset(
    {("circle", "ball"), ("circle", "wheel"), ("circle", "ring"), ("ring", "wheel"), ("square", "diamond")}
)
"""Pairs of which one could be called by the other's name: where it matters, no question is asked."""
