"""Every number and list of the smol_omni recipe, in one place."""
# ruff: noqa: SIM905

from __future__ import annotations

SEED = 20260

# Image geometry: a grey canvas of 2 x 8 merged tokens of 28 x 28 pixels.
HEIGHT, WIDTH = 56, 224
PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL
SUBCOLUMNS = WIDTH // PATCH

# Audio geometry: 1.6 s at 16 kHz is 160 mel frames and 40 audio tokens; digits sit in three slots.
RATE = 16_000
SAMPLES = 25_600
FRAMES = 160
AUDIO_TOKENS = 40
SLOTS = 3
SLOT_TOKENS = 13
TOKEN_SAMPLES = SAMPLES // AUDIO_TOKENS
PERIOD = SLOTS + 1

# Special tokens of SmolLM2 that ordinary chat never uses.
SPECIALS = {
    "image_token": "<repo_name>",
    "audio_token": "<reponame>",
    "video_token": "<gh_stars>",
    "vision_bos_token": "<file_sep>",
    "vision_eos_token": "<filename>",
    "audio_bos_token": "<issue_start>",
    "audio_eos_token": "<issue_comment>",
}

NEUTRAL = "\n"
DIGITS = list("0123456789")
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

SPOKEN_WORDS = (
    "water house ball body arrow wood doctor table wing phone stone angle target fish bridge river "
    "forest window mother market flower yellow paper story apple boat brown green black video memory "
    "engine school energy letter food bird player minute future party number random friend color king "
    "system human storm angel coin month night open train light total mask"
).split()

PRINTED_WORDS = (
    SPOKEN_WORDS
    + (
        "ice form round stand land day name line path face data side order time hold place key play ground "
        "joy text head right bank size word room point list value print mark life change state year wide "
        "start book vote index model user hand code level action vision road plot result image map stream "
        "cell sum normal long band free bed west string create node host organ main status ship pack world "
        "page real press child draw title edge plant oven close batch root search file door link graph chain "
        "common left power anger mail field layer block zone sign unit event style grid foot stop score"
    ).split()
)

# One share per task of the vision pool and of the audio pool.
VISION_POOL = {"words": 10000, "numbers": 2500, "digits": 2500}
AUDIO_POOL = {"words": 7000, "digits": 7000}
CLIPS = 60

CALIBRATION = 128
EVALUATION = 200
PASSAGE_TOKENS = 128
PROSE = {
    "train": ["GPL-2", "GPL-1", "Apache-2.0", "CC0-1.0", "BSD"],
    "calibration": ["LGPL-2.1", "GFDL-1.3", "MPL-1.1", "Artistic"],
    "evaluation": ["GPL-3", "MPL-2.0", "LGPL-3"],
}
LICENSES = "/usr/share/common-licenses"

QUESTIONS = {
    "digits": [
        "What number is handwritten here?",
        "Read the handwritten number.",
        "Which two digits do you see?",
    ],
    "read": [
        "What is printed in the picture?",
        "Read the printed text.",
        "Which word or number is this?",
    ],
    "speech": ["What was said?", "Write down the speech.", "What do you hear?"],
    "joint": [
        "Is the spoken word the written one?",
        "Do you hear the word in the picture?",
    ],
}

# Fonts: every Latin text face of these Debian packages; the held-out families appear in evaluation only.
FONT_FOLDERS = [
    "/usr/share/fonts/truetype/dejavu",
    "/usr/share/fonts/truetype/liberation",
    "/usr/share/fonts/truetype/freefont",
    "/usr/share/fonts/truetype/lato",
    "/usr/share/fonts/truetype/open-sans",
    "/usr/share/fonts/truetype/crosextra",
    "/usr/share/fonts/truetype/roboto/unhinted/RobotoTTF",
    "/usr/share/fonts/opentype/cantarell",
    "/usr/share/fonts/opentype/cabin",
]
FONTS_SKIPPED = ("Hairline", "Thin", "ExtraLight", "MathTeX", "Black", "CondLight")
FONTS_HELD_OUT = (
    "LiberationSans-Regular",
    "DejaVuSerif.ttf",
    "Carlito-Regular",
    "Cabin-Medium.otf",
    "Roboto-Medium.ttf",
    "Lato-Semibold.ttf",
    "FreeSans.ttf",
    "OpenSans-Semibold.ttf",
)

ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc"]
VARIANTS = (
    "m1 m2 m3 m5 m6 m7 m8 f1 f2 f4 f5 Alex Alicia Andrea Annie Denis Gene Hugo Jacky Lee Marco Mario "
    "Michael Mike adam anika antonio aunty belinda benjamin boris david edward john linda max"
).split()
VARIANTS_HELD_OUT = "m4 f3 Andy caleb paul rob steph".split()
SPEEDS = (165, 235)
PITCHES = (25, 75)

# Towers.
WIDTH_TOWER = 192
DEPTH = 4
HEADS = 6
VISION_MLP = 512
AUDIO_MLP = 768
MELS = 80

# Warm-up.
WARM_BATCH = {"vision": 32, "audio": 64}
WARM_RATE = {"vision": 1.0e-3, "audio": 1.5e-3}
WARM_STEPS = {"vision": 2500, "audio": 900}
TEMPERATURE = 12.0
REGRESSION = 4.0

# Alignment.
RANK = 16
ADAPTED_FROM = 6
ORACLE_AUDIO_TOKENS = 12
ORACLE_BATCH = 8
# One counter of steps runs through the three stages; each number says where a stage ends.
ORACLE_STEPS = 400
ALIGN_BATCH = 12
ALIGN_STEPS = 672
JOINT_BATCH = 16
JOINT_STEPS = 1020
RATE_ADAPTER = 1.0e-3
RATE_TOWER = 1.0e-4
