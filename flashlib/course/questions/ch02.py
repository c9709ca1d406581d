"""What chapter 02 asks, and why the answers are what they are."""

from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "02-exp-overflow",
        "From which score on is exp(score) infinite in half precision (fp16)?",
        default=65504,
        within=1.2,
        reason="The logarithm of the largest number is the limit, and log 65,504 is 11.09. In bfloat16, which has the range of float32, it would be 88.7.",
    ),
    Question(
        "02-rescales",
        "The row below comes in 8 blocks of 32 scores. In how many of them does the running maximum rise?",
        default=8,
        within=1.0,
        reason="The more one has seen, the rarer a new maximum. In a shuffled row the n-th block would have it 1 time in n, {expected:.1f} of 8 on average. This row is not shuffled: its large scores come late.",
    ),
    Question(
        "02-start-at-zero",
        "All scores are near -120 and the running maximum starts at 0. What comes out, in fp32?",
        default="the right answer",
        choices=("the right answer", "an answer a few percent off", "NaN"),
        reason="exp(-120) is 0 in fp32, so acc and l are both 0, and 0 / 0 is NaN.",
    ),
    Question(
        "02-added-outputs",
        "Outputs of four quarters of the keys, simply added: how large is the error, relative to the right output?",
        default="about 1e-7",
        choices=("about 1e-7", "about 1e-2", "more than 1"),
        reason="Four outputs, each already divided by its own sum, are added: about four times too much, and wrongly weighted.",
    ),
)
