"""Lay out the files of a new exercise: `flashlib new-exercise ex21 --topic rope_scaling --chapter 05_heads_positions_cache`.

They make a whole small exercise, which grades and is graded; what it asks is then replaced, file by file.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

__all__ = ["lay_out"]

REPOSITORY = Path(__file__).resolve().parents[2]
# Where each template of flashlib.course.templates goes.
FILES = {
    "solution": "solutions/{name}_{topic}.py",
    "checks": "flashlib/course/exercises/{name}.py",
    "wrong": "tests/grader/wrong/{name}/not_scaled.py",
    "right": "tests/grader/right/{name}/by_einsum.py",
}


def lay_out(name: str, topic: str, chapter: str, title: str, repository: Path = REPOSITORY) -> list[Path]:
    """Write the files of a new exercise, and say which.

    The file in `exercises/` is not among them: `python -m flashlib.course.stubs` makes it from the solution.

    Args:
        name: `"ex21"`. topic: of the file's name, such as `"rope_scaling"`. title: a few words.
        chapter: the notebook it belongs to, such as `"05_heads_positions_cache"`.

    Raises:
        ValueError: a name that is none, or taken; no such chapter.
    """
    if not re.fullmatch(r"ex\d\d", name):
        raise ValueError(f"name must be ex and two digits, such as ex21; got {name!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", topic):
        raise ValueError(f"topic must be a word for a file's name, such as rope_scaling; got {topic!r}")
    if not title or '"' in title or "\n" in title:
        raise ValueError(f"title must be one line without double quotes; got {title!r}")
    chapters = sorted(path.stem for path in (repository / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if chapter not in chapters:
        raise ValueError(f"there is no chapter {chapter!r}; there are {', '.join(chapters)}")
    taken = [
        *(repository / "solutions").glob(f"{name}_*.py"),
        *(repository / "flashlib/course/exercises").glob(f"{name}.py"),
    ]
    if taken:
        raise ValueError(f"{name} is taken: {', '.join(str(path.relative_to(repository)) for path in taken)}")
    written = []
    for template, place in FILES.items():
        text = (resources.files("flashlib.course.templates") / f"{template}.py.txt").read_text(encoding="utf-8")
        path = repository / place.format(name=name, topic=topic)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            Template(text).substitute(name=name, topic=topic, chapter=chapter, title=title), encoding="utf-8"
        )
        written.append(path)
    return written
