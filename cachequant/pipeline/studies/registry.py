"""The studies by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cachequant.errors import UserError
from cachequant.lock import writer_lock
from cachequant.pipeline.studies import error, formats, memory, scaling, schedule
from cachequant.pipeline.studies.findings import Findings, write_study
from cachequant.pipeline.studies.subject import StudySubject

Study = Callable[[StudySubject, int], Findings]
"""(subject, images or samples that judge) -> what was found."""

STUDIES: dict[str, Study] = {
    "error": error.study,
    "schedule": schedule.study,
    "memory": memory.study,
    "scaling": scaling.study,
    "formats": formats.study,
}


def run_study(
    name: str, path: Path, overrides: list[str], device: str, out: Path | None, count: int
) -> tuple[Findings, list[Path]]:
    """Make a study and write its page: what it found, and the files.

    Args:
        name: of `STUDIES`.
        path, overrides, device: of `StudySubject.at`.
        out: HTML file, default `study-NAME.html` in the run's or plan's folder.
        count: images or samples that judge.

    Raises:
        UserError: no such study or subject, another writer, or a folder that cannot be written.
    """
    if name not in STUDIES:
        raise UserError(f"--study is {name!r}, expected one of {', '.join(STUDIES)}")
    subject = StudySubject.at(path, overrides, device)
    with writer_lock(subject.stages.store.root):
        findings = STUDIES[name](subject, count)
        return findings, write_study(findings, subject.context, out or subject.folder / f"study-{name}.html")
