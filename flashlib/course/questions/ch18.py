"""What chapter 18 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "18-right",
        "Sixteen claims by people who know the subject. How many are simply right?",
        default=8,
        within=1.3,
        reason="Most leave out of what, against what, or at which border. Without that they are wrong; some are wrong with it.",
    ),
    Question(
        "18-saved",
        "One head's memory at 1,024 tokens: how much of it does tiling save, in %? (The document says 50 to 70.)",
        default=60,
        unit="%",
        within=1.1,
        reason="A ratio of N^2 to N is no percentage. With each doubling of the text what is left is halved.",
    ),
    Question(
        "18-summed",
        "Four splits, each with its own softmax, and their outputs added up as the document does it. By which factor is the sum too large?",
        default=1,
        within=1.2,
        reason="The weights of each split sum to 1, and those of four to 4.",
    ),
    Question(
        "18-backward",
        "Backward passes on the H200 against cuDNN: in how many of 20 recorded cells is ours slower?",
        default=5,
        within=1.2,
        reason="All of them, by at most {most:.0%}. README says so too, in its first sentence of figures.",
    ),
)
