"""Run a stranger's functions on given arrays, and survive whatever they do.

Three kinds of process take part:

- the *grader* draws the inputs, knows the oracle and speaks the verdict. It starts the others (`session.py`) and talks to a child
  (`conversation.py`), with which it shares the memory of a call's arguments (`arena.py`);
- the *zygote* (`zygote.py`) has PyTorch loaded and does nothing but fork, so that a new child costs milliseconds;
- a *child* (`child.py`), forked for one submission, fences itself in (`confine.py`), then imports the student's file and
  answers calls. When it has to be stopped, the next one goes on.

Grader and child speak in frames of JSON and raw bytes (`wire.py`); nothing is ever unpickled. The zygote and its children
never import `flashlib` itself: the answer to most exercises is in it.
"""
