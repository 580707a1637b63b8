"""In place of tensors: an executor that takes the time a cost model says, and whose tokens are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from core.blocks import KvLayout
from core.clock import ManualClock
from core.config import EngineConfig
from core.cost_model import StepShape
from core.inventory import Inventory
from engine.loop import StepLoop
from engine.output import StepOutput
from engine.role import Role
from engine.step import Sampled, SampleSpec, StepPlan
from sim.counted import ANY_ID, StepTime
from sim.prompt import Content


class CostExecutor:
    """`contents`: what requests are about, by the seed of their sampling, which names them. A token's logprob is the time at
    which it was sampled: so it reaches the reader beside the token, through everything in between."""

    def __init__(self, layout: KvLayout, num_blocks: int, step_s: StepTime, contents: Mapping[int, Content]) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.clock = ManualClock()
        """Of the worker: a step moves it on."""
        self._step_s = step_s
        self._contents = contents

    def run(self, plan: StepPlan) -> list[Sampled]:
        shape = StepShape.of((len(row.token_ids), row.start) for row in plan.rows)
        self.clock.advance(self._step_s(shape))
        end = self.clock.now()
        return [Sampled(row.seq_id, self._token(row.sample), end, ()) for row in plan.rows if row.sample is not None]

    def _token(self, sample: SampleSpec) -> int:
        """Of a request that is over already, any."""
        content = self._contents.get(sample.params.seed or 0)
        return ANY_ID if content is None else content.token(sample.position)

    def forget(self, seq_id: int) -> None:
        """It remembers nothing."""


class ExactLoop(StepLoop):
    """The shipped loop with real tokens, step by step, driven as a `CountedLoop` is.

    A step's effects on the inventory show from its beginning on, where on a worker they come during and after it.
    """

    def __init__(
        self,
        config: EngineConfig,
        role: Role,
        inventory: Inventory,
        executor: CostExecutor,
        root_key: Callable[[bytes], bytes],
    ) -> None:
        super().__init__(config, role, inventory, executor, root_key, executor.clock.now)
        self._worker_clock = executor.clock
        self._output = StepOutput()
        self._end = 0.0

    def begin(self, now: float) -> float:
        clock = self._worker_clock
        clock.advance(max(now - clock.now(), 0.0))
        self._output = self.step(now)
        self._end = clock.now() if self._output.num_tokens else now
        return self._end

    def cut(self, now: float) -> tuple[float, StepOutput]:
        return max(self._end, now), StepOutput()

    def sync(self, now: float) -> None:
        """No step is taken in advance."""

    def squeezed(self, now: float) -> bool:
        return False

    def finish(self) -> StepOutput:
        output, self._output = self._output, StepOutput()
        return output
