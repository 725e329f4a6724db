"""What a stage is before it works: its part of the model, its record for the others."""

from __future__ import annotations

import msgspec

from common.membership import MemberRecord
from common.model.spec import ModelSpec, load_spec
from common.service import own_record
from common.stage.options import StageOptions
from dejavu.errors import ConfigurationError


def load_stage_spec(options: StageOptions) -> ModelSpec:
    """The model's spec, with the stage's layers checked against it. Raises `ConfigurationError`."""
    spec = load_spec(options.model, options.dtype)
    first, last = options.layers
    if not 0 <= first < last <= spec.num_layers:
        raise ConfigurationError(f"layers {first}:{last} are not within 0:{spec.num_layers}", field="layers")
    return spec


def stage_record(options: StageOptions, incarnation: str, endpoint: str, details: dict[str, str]) -> MemberRecord:
    """What the others are told about this process."""
    detail: dict[str, str | int | float] = {
        "colocated": int(options.is_colocated),
        "other_pipeline": options.other_pipeline,
        **details,
    }
    return msgspec.structs.replace(
        own_record(options.name, options.role, incarnation, endpoint, detail),
        pipeline=options.pipeline,
        stage_index=options.stage_index,
        num_stages=options.num_stages,
        layers=options.layers,
        state="standby" if options.is_standby else "active",
    )
