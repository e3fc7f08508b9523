"""Every number and list of the smol_omni recipe, in one place."""
# ruff: noqa: SIM905

from __future__ import annotations

SEED = 20260

# Image geometry: a grey canvas of 2 x 8 merged tokens of 28 x 28 pixels.
HEIGHT, WIDTH = 56, 224
PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
ROWS, COLUMNS = HEIGHT // CELL, WIDTH // CELL
SUBCOLUMNS, PATCH_ROWS = WIDTH // PATCH, HEIGHT // PATCH

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
PLATE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
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

# What a clip may ask about the two digits in a picture: the words spoken, and the token they become.
COMMANDS = {"the first digit": "first", "the last digit": "last", "the sum": "sum", "the highest": "highest"}

# Pictures: fonts of a line of characters, of a table; the deviation of the noise in grey levels.
LINE_SIZES = {"number": (26, 44), "plate": (24, 38)}
TABLE_SIZES = (18, 27)
GREY_NOISE = 16
# Handwriting in training: largest rotation in degrees, largest shear.
LEAN, SLANT = 12, 0.25
# Noise of a clip, as a share of full scale; speech peaks at 0.3 to 0.6 of it.
AUDIO_NOISE = 0.02
# Handwritten scans by split, of 1797.
SCANS = {"train": 1000, "calibration": 200, "evaluation": 300, "final": 297}

# Training samples by kind; recordings of each word, digit and command.
VISION_POOL = {"word": 9000, "number": 3000, "plate": 6000, "hand": 6000, "table": 6000}
AUDIO_POOL = {"word": 7000, "digits": 7000, "command": 2000}
CHECK = 240
CLIPS = {"word": 60, "digits": 180, "command": 300}

# What ships: samples per task and split, recordings behind them, kinds of printed things.
SHIPPED = {"calibration": 256, "evaluation": 400, "final": 400}
SHIPPED_CLIPS = {"word": 8, "digits": 24, "command": 32}
READ_KINDS = ("word", "number", "plate", "word", "plate")
MEDIA_TASKS = ("read", "digits", "sum", "table", "speech", "same", "larger", "ask")

PASSAGE_TOKENS = 64
TRAINING_PASSAGE_TOKENS = 128
PROSE_KINDS = ("manual", "tale")
# Documents by split. The manual is Python's own (package python3.11-doc), tales are books of the King James Bible.
MANUAL_FOLDER = "/usr/share/doc/python3.11/html/_sources"
MANUAL = {
    "train": ["library/[a-e]*.txt", "reference/*.txt"],
    "calibration": ["library/[p-r]*.txt", "howto/[a-l]*.txt"],
    "evaluation": ["tutorial/*.txt", "howto/[m-z]*.txt", "library/[s-z]*.txt"],
    "final": ["faq/*.txt", "library/[f-o]*.txt", "extending/*.txt"],
}
TALE = {
    "train": ["Gen", "Exo", "Josh"],
    "calibration": ["Judg", "Ruth", "Esth"],
    "evaluation": ["1Sam", "2Sam"],
    "final": ["1Kin", "2Kin"],
}
TALE_CHAPTERS = {
    "Gen": 50, "Exo": 40, "Josh": 24, "Judg": 21, "Ruth": 4, "Esth": 10, "1Sam": 31, "2Sam": 24, "1Kin": 22, "2Kin": 25
}  # fmt: skip
CHOICE_CONTEXT, CHOICE_WORDS, CHOICE_WRONG = 28, 8, 3
CHOICE_MIN_TEXT = 3000

QUESTIONS = {
    "read": ["What is printed in the picture?", "Read the printed text.", "Which word, number or plate is this?"],
    "digits": ["What number is handwritten here?", "Read the handwritten number.", "Which two digits do you see?"],
    "digits_first": ["Which digit comes first?", "What is the first digit?"],
    "digits_last": ["Which digit comes last?", "What is the last digit?"],
    "sum": ["What is the sum of the two digits?", "Add the two digits.", "How much are the digits together?"],
    "table": ["Read the table.", "What does the table say?"],
    "table_value": ["What is the value of {letter}?", "Which number belongs to {letter}?"],
    "table_letter": ["Which letter has the value {value}?", "What does {value} belong to?"],
    "speech": ["What was said?", "Write down the speech.", "What do you hear?"],
    "same": ["Written and spoken word: the same?", "Compare the written with the spoken word."],
    "larger": ["Which number is larger, the printed or the spoken one?", "Name the larger of the two numbers."],
    "ask": ["Answer the spoken question.", "Do what the voice asks."],
}
# How often a handwritten number is read, its first and its last digit asked; a table read, a value or a letter asked.
DIGITS_SHARES = (0.6, 0.2, 0.2)
TABLE_SHARES = (0.3, 0.4, 0.3)

# Training: what one picture and one clip are asked at once. Answers of all questions stand behind one shared prompt.
SCENES = {
    "read": {"media": ("image",), "tasks": ("read",), "batch": 24},
    "hand": {"media": ("image",), "tasks": ("digits", "sum", "digits"), "batch": 14},
    "table": {"media": ("image",), "tasks": ("table", "table", "table"), "batch": 14},
    "speech": {"media": ("audio",), "tasks": ("speech",), "batch": 16},
    "words": {"media": ("image", "audio"), "tasks": ("same",), "batch": 14},
    "numbers": {"media": ("image", "audio"), "tasks": ("larger", "read", "speech"), "batch": 10},
    "ask": {"media": ("image", "audio"), "tasks": ("ask", "sum"), "batch": 12},
}
# One round of steps; prose holds the adapted language model to the original.
ROUND = (
    "table numbers words hand ask words table read ask numbers speech prose "
    "table words ask hand numbers words table ask read words speech prose"
).split()

# Fonts: every upright or slanted Latin text face of these Debian packages. Whole families, with their clones, are kept
# for evaluation and others for the final split; a name is matched from its beginning.
FONT_FOLDERS = [
    "/usr/share/fonts/truetype/dejavu",
    "/usr/share/fonts/truetype/liberation",
    "/usr/share/fonts/truetype/freefont",
    "/usr/share/fonts/truetype/lato",
    "/usr/share/fonts/truetype/open-sans",
    "/usr/share/fonts/truetype/crosextra",
    "/usr/share/fonts/truetype/roboto/unhinted/RobotoTTF",
    "/usr/share/fonts/truetype/charis",
    "/usr/share/fonts/truetype/comfortaa",
    "/usr/share/fonts/truetype/firacode",
    "/usr/share/fonts/truetype/gentium",
    "/usr/share/fonts/truetype/hack",
    "/usr/share/fonts/truetype/inconsolata",
    "/usr/share/fonts/truetype/quicksand",
    "/usr/share/fonts/opentype/cantarell",
    "/usr/share/fonts/opentype/cabin",
    "/usr/share/fonts/opentype/ebgaramond",
    "/usr/share/fonts/opentype/linux-libertine",
    "/usr/share/fonts/opentype/roboto/slab",
    "/usr/share/fonts/opentype/urw-base35",
    "/usr/share/texmf/fonts/opentype/public/tex-gyre",
]
FONTS_SKIPPED = (
    "Hairline", "Thin", "ExtraLight", "MathTeX", "Black", "CondLight",
    "D050000L", "StandardSymbols", "Z003", "chorus", "Biolinum_K",
)  # fmt: skip
FONTS_HELD_OUT = {
    "evaluation": ("Carlito", "Cabin", "Hack", "Gentium", "P052", "texgyrepagella"),
    "final": ("Caladea", "Cantarell", "Inconsolata", "Charis", "URWBookman", "texgyrebonum", "Quicksand"),
}

ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc"]
VARIANTS = (
    "m1 m2 m3 m5 m6 m7 f1 f2 f4 Alex Alicia Andrea Annie Denis Gene Hugo Jacky Lee Marco Mario "
    "Michael adam anika antonio aunty belinda benjamin boris david edward john linda"
).split()
VARIANTS_HELD_OUT = {
    "evaluation": "m4 f3 Andy caleb paul rob steph".split(),
    "final": "m8 f5 Mike max".split(),
}
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
WARM_RATE = {"vision": 1.2e-3, "audio": 1.5e-3}
WARM_STEPS = {"vision": 3800, "audio": 1500}
# From these steps on, shares of every batch of pictures drawn from single kinds: letters are learned first, then the
# words made of them, then handwriting, which has few scans.
PRACTICE = {0: {}, 1400: {"word": 0.6}, 2600: {"word": 0.35, "hand": 0.35}}
# After the first alignment the towers go on with their dense labels, and a second, short alignment follows.
POLISH_STEPS = {"vision": 1300, "audio": 550}
POLISH_RATE = {"vision": 7.0e-4, "audio": 8.0e-4}
TEMPERATURE = 12.0
REGRESSION = 4.0

# Alignment: towers stay as the warm-up left them up to TOWERS_FROM.
RANK = 16
ADAPTED_FROM = 6
ALIGN_STEPS = 640
SECOND_STEPS = 736
SECOND_RATE = 0.6
TOWERS_FROM = 144
RATE_ADAPTER = 7.0e-4
RATE_TOWER = 1.5e-4
PROSE_BATCH = 4
