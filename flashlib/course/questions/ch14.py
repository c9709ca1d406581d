"""What chapter 14 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "14-share-of-memory",
        "192 of 256 tokens are in the memory. On average, what share of the attention falls on it?",
        default=75,
        unit="%",
        within=1.1,
        reason="Most heads of this layer look at what is near. Three of them look far.",
    ),
    Question(
        "14-gated-part",
        "A row needs the memory: w = 0.99. With alpha = 0.1 in the meaning of a gate, what part of its output is memory?",
        default=10,
        unit="%",
        within=1.2,
        reason="Ten times less than 99 parts is still ten times as much as one part.",
    ),
    Question(
        "14-averaged-error",
        "The memory in 4 chunks of 48 keys: inject each, average the four outputs. How far off is the result, relative to its size?",
        default=1,
        unit="%",
        within=2,
        reason="A chunk in which a query finds nothing counts as much as the one with the answer.",
    ),
    Question(
        "14-peak-ratio",
        "Chunks of 1,024 keys, 32 of them. Converting the whole memory at once needs how many times the peak memory?",
        default=32,
        within=1.5,
        reason="One chunk in 32 bits, and results that do not grow.",
    ),
    Question(
        "14-gain",
        "With the memory, the log-probability of the six answers rises on average by how much?",
        default=2,
        within=1.5,
        reason="About ten: a factor of twenty thousand, per answer.",
    ),
    Question(
        "14-overlap",
        "The memory's keys are left at 0 .. 101, where the prompt is. What becomes of the gain?",
        default="nothing changes",
        choices=("nothing changes", "a good part of it is lost", "nothing is left of it"),
        reason="To the model most of the memory lies in the future, where it has never seen a key.",
    ),
    Question(
        "14-best-alpha",
        "In mode gate, alphas 0.03, 0.1, 0.25, 0.5 and 1: which makes the answers most likely?",
        default=1,
        within=1.1,
        reason="That is a fact about this model and this text. Nothing in the formula says so.",
    ),
    Question(
        "14-read-ratio",
        "One decode step over 16 concatenated caches reads how many times as many bytes of keys as with the prefix shared?",
        default=2,
        within=1.2,
        reason="16 x 256 keys, against 240 + 16 x 16.",
    ),
)
