"""What a study is about: a configuration, or a plan with the run that it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cachequant.config import load_config
from cachequant.errors import UserError
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import JUDGING, Context
from cachequant.pipeline.report import Subject
from cachequant.pipeline.stages import Stages
from cachequant.plan import Plan


@dataclass(frozen=True)
class StudySubject:
    """Pipeline, configuration and stages; a plan where one was given.

    Attributes:
        stages: of the configuration; what is current in the run's folder is not computed again.
        given: the plan that the study was asked for, or None.
        folder: where its page goes if nothing else is said.
    """

    stages: Stages
    given: Plan | None
    folder: Path

    @staticmethod
    def at(path: Path, overrides: list[str], device: str = "auto") -> StudySubject:
        """A YAML file with its overrides, a plan folder, or a run folder with plans (its newest one).

        Raises:
            UserError: neither is there, overrides were given for a plan, or its model is another now.
        """
        if path.suffix in (".yaml", ".yml"):
            config = load_config(path, overrides)
            context = Context.of(load_pipeline(config.model, config.device if device == "auto" else device), config)
            stages = Stages.at(context)
            return StudySubject(stages, None, stages.store.root)
        if overrides:
            raise UserError(f"--set {overrides[0]} with a plan, expected a configuration file: study that to change it")
        subject = Subject.at(path)
        plan = next(iter(subject.plans.values()))
        context = Context.of(load_pipeline(plan.config.model, device), plan.config)
        plan.identity.refuse_other(context.identity)
        return StudySubject(Stages.at(context, subject.stages or path / "studies", quiet=True), plan, path)

    @property
    def context(self) -> Context:
        """Pipeline and configuration."""
        return self.stages.context

    def plan(self) -> Plan:
        """The plan that was given, or the one that the configuration makes."""
        return self.given or self.stages.plan()[0]

    def judging(self, count: int) -> tuple[Context, list[int]]:
        """A context that draws `count` images at once where they fit in a batch, and seeds of noise that is new to it."""
        config = self.context.config
        size = min(count, max(config.sample.batch_size, config.calibration.batch_size))
        sized = replace(config, sample=replace(config.sample, batch_size=size))
        return replace(self.context, config=sized), self.context.seeds(JUDGING, count)
