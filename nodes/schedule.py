"""Scale Schedule and Causal Sampler: the two forms of one schedule, as readable text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from . import host, sockets

if TYPE_CHECKING:
    from ..star_core.config import TokenMap
    from ..star_core.schedule import ScaleSchedule
    from ..star_core.schedule_parts import Part, SamplerPart

DEFAULT_SCHEDULE = "maps 1 2 3 4 5 6 8 10 13 16\ntop_k 600\ntop_p 0.8\nguidance ramp 4\ntemperature 1"
DEFAULT_STEPS = "maps 1 2 3 4 5 6 8 10 13 16\nsteps 0*6 8*4\ntransformer_steps 0*6 5*3 0\nrandom_steps 0*6 5*4"
STRATEGIES = ["official", "confidence", "masked"]
HOW_TO_WRITE = (
    " One line per quantity: its name, then values from coarse to fine; 600*9 repeats, one value serves all"
    " scales. maps (optional) says which token maps it is for; a model with others refuses it, unless a line"
    " stretch yes lets it take the nearest scale's values. A preset's name alone is allowed: official-256,"
    " official-512, official-1024, demo-1024, sampler, old, top-k, smooth, fast, fast-1024, fastest."
)
MODEL_TOOLTIP = "Optional: tells the editor the model's sides, and has the text checked against it at once."


class StarScaleSchedule(io.ComfyNode):
    """Form of the drawing part of `star_core.schedule.ScaleSchedule`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarScaleSchedule",
            display_name="Scale Schedule",
            category=sockets.CATEGORY,
            description=(
                "How every scale is drawn: top-k, top-p, guidance, temperature, smooth, a value for each"
                " scale from coarse to fine. Drag the bars or edit the text. Without this node the"
                " checkpoint's own schedule holds."
            ),
            inputs=[
                io.String.Input(
                    "schedule",
                    multiline=True,
                    default=DEFAULT_SCHEDULE,
                    tooltip=(
                        "top_k: how many codes may be drawn, 0 is off. top_p: share of probability, 0 is off."
                        " guidance: strength t in (1 + t) conditional - t unconditional; ramp 4 grows from 0"
                        " to 4. temperature: divides the logits. smooth: yes draws a soft mixture of codes."
                        " unguided: yes draws without guidance, the causal sampler's included; prune: share of"
                        " the scale's tokens that are not computed but restored from the scale before. Both are"
                        " faster and change the picture." + HOW_TO_WRITE
                    ),
                ),
                sockets.Model.Input("model", optional=True, tooltip=MODEL_TOOLTIP),
            ],
            outputs=[
                sockets.Schedule.Output(
                    "SCHEDULE", display_name="schedule", tooltip="For Scale-wise Sample's schedule."
                )
            ],
            **host.newer(io.Schema, search_aliases=["top k", "top p", "cfg", "guidance", "temperature"]),
        )

    @classmethod
    def validate_inputs(cls, schedule: str | None = None) -> bool | str:
        return _problem(schedule, "drawing")

    @classmethod
    def execute(cls, schedule: str, model: sockets.ModelHandle | None = None) -> io.NodeOutput:
        _check(schedule, "drawing")
        if model is not None:
            whole(model, model.config.maps, sockets.ScheduleText(schedule), None)
        return io.NodeOutput(sockets.ScheduleText(schedule))


class StarCausalSampler(io.ComfyNode):
    """Form of the sampler part of `star_core.schedule.ScaleSchedule`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarCausalSampler",
            display_name="Causal Sampler",
            category=sockets.CATEGORY,
            description=(
                "Draws large token maps in several steps, each given the tokens before, with the small causal"
                " sampler of the checkpoint. Plug it into Scale-wise Sample. A checkpoint without a causal"
                " sampler refuses it."
            ),
            inputs=[
                io.String.Input(
                    "steps",
                    multiline=True,
                    default=DEFAULT_STEPS,
                    tooltip=(
                        "steps: how many steps a scale is drawn in, 0 is off. transformer_steps: how many of"
                        " the first ones draw from the transformer's logits. random_steps: how many of the"
                        " first ones"
                        " fix tokens in random order, later ones by confidence." + HOW_TO_WRITE
                    ),
                ),
                io.Combo.Input(
                    "strategy",
                    options=STRATEGIES,
                    default="official",
                    tooltip=(
                        "official: as the released code, which fixes twice in a step that the transformer"
                        " draws. confidence: each step fixes its count once. masked: as confidence, and every"
                        " step draws from the causal sampler (transformer_steps do not count)."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    default=4.0,
                    min=-100.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the causal sampler's own logits, the same at every scale. 0 is off.",
                ),
                sockets.Model.Input("model", optional=True, tooltip=MODEL_TOOLTIP),
            ],
            outputs=[
                sockets.Sampler.Output(
                    "SAMPLER", display_name="sampler", tooltip="For Scale-wise Sample's sampler."
                )
            ],
            **host.newer(io.Schema, search_aliases=["refine", "steps", "star sampler", "maskgit"]),
        )

    @classmethod
    def validate_inputs(cls, steps: str | None = None) -> bool | str:
        return _problem(steps, "sampler")

    @classmethod
    def execute(
        cls, steps: str, strategy: str, guidance: float, model: sockets.ModelHandle | None = None
    ) -> io.NodeOutput:
        from ..star_core.schedule_parts import SamplerPart

        _check(steps, "sampler")
        part = SamplerPart(steps, strategy, guidance)  # type: ignore[arg-type]  # one of the combo's options
        if model is not None:
            whole(model, model.config.maps, sockets.ScheduleText("temperature 1"), part)
        return io.NodeOutput(part)


def whole(
    model: sockets.ModelHandle,
    maps: tuple[TokenMap, ...],
    schedule: sockets.ScheduleText | None,
    sampler: SamplerPart | None,
) -> ScaleSchedule:
    """Return the one schedule that two forms make for a model. Raises ValueError for what it cannot run."""
    from ..star_core.schedule_parts import assemble

    return assemble(
        maps,
        model.config.transformer.codebook_size,
        has_sampler=model.has_sampler,
        own=model.config.schedule,
        drawing=None if schedule is None else schedule.text,
        sampler=sampler,
    )


def _check(text: str, part: Part) -> None:
    from ..star_core.schedule_parts import check_part

    check_part(text, part)


def _problem(text: str | None, part: Part) -> bool | str:
    """Return True, or what is wrong with a text; one that comes over a link is checked when it is there."""
    if text is None:
        return True
    try:
        _check(text, part)
    except ValueError as error:
        return str(error)
    return True
