"""The studies by name."""

from __future__ import annotations

from collections.abc import Callable

from cachequant.errors import UserError
from cachequant.pipeline.studies import error, memory, scaling, schedule
from cachequant.pipeline.studies.findings import Findings
from cachequant.pipeline.studies.subject import StudySubject

Study = Callable[[StudySubject, int], Findings]
"""(subject, images or samples that judge) -> what was found."""

STUDIES: dict[str, Study] = {
    "error": error.study,
    "schedule": schedule.study,
    "memory": memory.study,
    "scaling": scaling.study,
}


def study_named(name: str) -> Study:
    """The study called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in STUDIES:
        raise UserError(f"--study is {name!r}, expected one of {', '.join(STUDIES)}")
    return STUDIES[name]
