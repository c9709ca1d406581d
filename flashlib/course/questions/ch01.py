"""What chapter 01 asks, and why the answers are what they are."""

from flashlib.course.figures.hierarchy import h200_memory
from flashlib.course.questions.question import Question
from flashlib.measure.records.record import load_record

_H200_GIB = h200_memory(load_record("h200/attention_steps"))[-1].bytes / 2**30

QUESTIONS = (
    Question(
        "01-last-token",
        "Head 5, the last token, 'the': to which token does it give the most weight?",
        default="after, which stands before it",
        choices=("after, which stands before it", "the, where it stood before", "White", "Rabbit"),
        reason="The head looks for what followed 'the' the last time. It is about to continue the sentence.",
    ),
    Question(
        "01-same-bits",
        "PyTorch has attention built in. By how much does its float32 result differ from ours?",
        default="not at all",
        choices=("not at all", "in the last of 7 digits", "in the third digit"),
        reason="Each addition rounds. Another order of additions rounds differently, and is not worse.",
    ),
    Question(
        "01-largest-tensor",
        "2,048 tokens; Q takes 4.7 MB. How large is the largest tensor that naive attention makes?",
        default=4.7,
        unit="MB",
        within=1.5,
        reason="9 heads x 2,048 x 2,048 scores x 4 bytes.",
    ),
    Question(
        "01-moved-ratio",
        "Inputs and output hold 12.6 MB. How many times that does naive attention read and write?",
        default=3,
        within=2,
        reason="Each line reads the matrix from memory, and writes it back.",
    ),
    Question(
        "01-doubling",
        "The text gets twice as long. By which factor does the peak of naive attention grow?",
        default=2,
        within=1.1,
        reason="N rows of N scores each. At 256 tokens the copies of K and V still count a little.",
    ),
    Question(
        "01-wall-16",
        "A laptop with 16 GiB, all for this layer. At how many tokens does naive attention fill it?",
        default=100000,
        within=1.5,
        reason="N grows only as the square root of the memory.",
    ),
    Question(
        "01-wall-h200",
        f"The H200 has {_H200_GIB:.0f} GiB. Doubling from 1,024, which length is the first that does not fit?",
        default="262,144",
        choices=("16,384", "65,536", "262,144", "1,048,576"),
        reason="Nine times the laptop's memory, three times as far: 37,000.",
    ),
    Question(
        "01-matmul-share",
        "QKᵀ and PV do 98% of the arithmetic. At 16,384 tokens, which share of the time do they take?",
        default=90,
        unit="%",
        within=1.5,
        reason="The other three steps compute next to nothing, and move the whole matrix in and out.",
    ),
    Question(
        "01-matrix-needed",
        "Can the same result be computed without ever holding a whole row of scores?",
        default="no",
        choices=("no", "only approximately", "yes, within the error budget"),
        reason="A running maximum and a running sum are enough: chapter 02.",
    ),
)
