"""What the scenes are about: the questions that are asked and the answers that can be given."""

TEMPLATES = (
    "read digit",
    "color of digit",
    "color of shape",
    "shape of color",
    "count shape",
    "is color present",
    "is digit left of color",
)
COLORS = ("red", "green", "blue", "yellow", "magenta")
SHAPES = ("circle", "square", "triangle", "cross")
NO_SHAPE, NO_COLOR = len(SHAPES), len(COLORS)  # what a question says that names none
ANSWERS = (*map(str, range(10)), *COLORS, *SHAPES, "yes", "no")  # digits are also counts


def question_text(question) -> str:
    """Returns the words of a question (template, shape, colour)."""
    template, shape, color = (int(x) for x in question)
    shape_name = (*SHAPES, "?")[shape]
    color_name = (*COLORS, "?")[color]
    return (
        "Which digit is written here?",
        "Which color is the digit?",
        f"Which color is the {shape_name}?",
        f"Which shape is {color_name}?",
        f"How many {shape_name}s are there?".replace("crosss", "crosses"),
        f"Is anything {color_name}?",
        f"Is the digit left of what is {color_name}?",
    )[template]
