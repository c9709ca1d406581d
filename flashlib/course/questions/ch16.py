"""What chapter 16 asks, and why the answers are what they are."""

from flashlib.course.chapters.diagnosis import HYPOTHESES
from flashlib.course.questions.question import Question

QUESTIONS = (
    Question(
        "16-launch",
        "The clock is read before a call and right behind it. The call takes 4 ms on the device. What does the difference say, in ms?",
        default=4,
        unit="ms",
        within=2,
        reason="That is how long it takes to launch. All three calls look the same.",
    ),
    Question(
        "16-warm",
        "The machine's cache makes a call that follows itself 2.5 times as fast. Timed again and again, what does call a (4 ms) seem to take?",
        default=4,
        unit="ms",
        within=1.1,
        reason="Every timed run but the first follows one of its own.",
    ),
    Question(
        "16-mean",
        "Every fifth run takes 30 times as long, the others about 4 ms. What is the mean of nine runs of call a, about?",
        default=5,
        unit="ms",
        within=1.4,
        reason="The median stays: it is the fifth of nine, whatever the last two are.",
    ),
    Question(
        "16-fp8",
        "Call B: somebody wants to speed it up with FP8 products on the tensor cores. Which counter refutes that?",
        default="none does",
        choices=(
            "memory is busy all the time",
            "tensor cores are idle nearly all the time",
            "exponentials are idle",
            "none does",
        ),
        reason="Faster products shorten what takes less than a tenth of the time. That memory is busy all the time says what would help: fewer bytes.",
    ),
    Question(
        "16-half",
        "Call C has head_dim 64: tensor cores and exponential units are each busy about half of the time. What binds it?",
        default="latency",
        choices=tuple(HYPOTHESES),
        reason="Neither is a roof by itself. But what one is busy, the other waits: together they are the whole time. Chapter 15 adds the two up for that reason.",
    ),
    Question(
        "16-idle",
        "Call D: no unit is busy. Its memory is read at less than half of its rate. What would help?",
        default="fewer bytes",
        choices=("fewer bytes", "faster products", "a shorter way through one program"),
        reason="One request, {us:.0f} us: kernels start, programs fill and drain, pieces are merged. Nothing lasts long enough to be busy.",
    ),
    Question(
        "16-regret",
        "autoselect stops early, on few runs. On the H200, over 15 classes, how far was the chosen backend from the best at worst, in %?",
        default=30,
        unit="%",
        within=2,
        reason="The best was timed again, apart from the race. A candidate leaves only when its fastest run is slower than the leader's median.",
    ),
)
