"""What chapter 06 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "06-trips",
        "Five operations. How many times does a matrix of this size cross between memory and processor?",
        default=5,
        within=1.1,
        reason="maximum: 1 read; subtract, exp, divide: 1 read and 1 write each; sum: 1 read. The rest is the row's numbers.",
    ),
    Question(
        "06-idle-lanes",
        "We double 1,000 numbers in blocks of 256. How many lanes, over all programs, load nothing?",
        default=232,
        within=1.0,
        reason="4 programs of 256 lanes are 1,024; 1,000 of them have an element.",
    ),
    Question(
        "06-strides",
        "We pass scores.T, a view with swapped strides, to the same kernel. What comes out?",
        default="nonsense",
        choices=("an error", "the softmax of the rows of scores", "the softmax of the columns of scores", "nonsense"),
        reason="Row i of scores.T is column i of scores. The kernel asks for both strides, and so reads exactly that.",
    ),
    Question(
        "06-sectors-of-a-column",
        "The kernel reads scores.T in place of scores: the same 262,144 bytes. How many times as many sectors does that take?",
        default=1,
        within=1.05,
        reason="The entries of a column lie 1,024 bytes apart: each is alone in its sector, where eight neighbors of a row share one.",
    ),
    Question(
        "06-causal-bytes",
        "Which fraction of the dense kernel's bytes does the causal one move, reads and writes together?",
        default=0.5,
        within=1.1,
        reason="Half of the entries are not read. All of the answer is written, its zeros too.",
    ),
    Question(
        "06-unmasked",
        "We double 1,000 numbers with it, as before: 4 programs, BLOCK=256. What happens in the interpreter?",
        default="an error",
        choices=(
            "an error",
            "the right 1,000 numbers, no harm done",
            "the right 1,000 numbers, and foreign memory changed",
        ),
        reason="The last 24 lanes have addresses behind the end, and nobody checks an address.",
    ),
    Question(
        "06-zeros",
        "Row 0 has one entry, so its only weight is 1. What does this kernel give it if all scores are 20 lower than ours?",
        default=1,
        within=1.05,
        reason="255 masked lanes hold the score 0, and each adds exp(0 - maximum), where the maximum is 0 as well.",
    ),
    Question(
        "06-race",
        "They add 256, 256, 256 and 232, in any order. How many different wrong totals may come out?",
        default=0,
        within=1.0,
        reason="A program that loaded an old total stores it with its own part alone: what others added meanwhile is lost.",
    ),
    Question(
        "06-bfloat16",
        "What is 1.5 + 2.25 in bfloat16, in the interpreter?",
        default="3.75",
        choices=("3.75", "an error", "something else, without an error"),
        reason="NumPy has no bfloat16. The interpreter keeps the 16 bits as an integer, and adds the integers.",
    ),
    Question(
        "06-tf32",
        "Scores from queries and keys rounded to TF32: by which factor is the largest error larger than with float32?",
        default="about the same",
        choices=("about the same", "10 to 100 times", "more than 100 times"),
        reason="13 bits fewer are a factor of 8,192 for each factor; errors of a sum of 64 products partly cancel.",
    ),
)
