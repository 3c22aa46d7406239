"""Simulates which parameters DeepSpeed's ZeRO-3 gathers, and when; the simulation uses no tensor data."""

from collections import defaultdict, deque
from collections.abc import Iterable

from torch import nn

from beit3_ds.pipeline.schedule_1f1b import schedule_1f1b
from beit3_ds.planner.rank_model import RankModel


def persistent_parameters(rank_model: RankModel) -> list[nn.Parameter]:
    """Returns the small parameters that ZeRO-3 keeps whole on every rank."""
    if rank_model.zero_stage != 3:
        return []
    threshold = rank_model.zero_elements("stage3_param_persistence_threshold")
    return [p for p in rank_model.model.parameters() if p.numel() <= threshold]


def padded(numel: int, ranks: int) -> int:
    """Returns `numel` rounded up to a multiple of `ranks`."""
    return -(-numel // ranks) * ranks


class Zero3Replay:
    """Simulates which parameters one rank gathers in each step under ZeRO-3.

    Replays `PartitionedParameterCoordinator` and the hooks of `DeepSpeedZeRoOffload` of DeepSpeed 0.19.8. Parameters
    are gathered before each forward or backward pass of their module, and released after the pass. A block gathers all
    its parameters together (`deepspeed_compat.gather_blocks_whole`); other modules gather only parameters of their own.

    Once the coordinator has recorded the order of modules, it prefetches up to `stage3_prefetch_bucket_size` elements,
    and keeps parameters that are used again within `stage3_max_reuse_distance` elements. When a pass leaves the
    recorded order, as in a pipeline, the order is recorded again.
    """

    def __init__(self, rank_model: RankModel) -> None:
        """Starts with all parameters partitioned, like the engine.

        Args:
            rank_model: the rank's part of the model.
        """
        self.rank_model = rank_model
        self.calls, self.elements, self.peak_elements = 0, 0, 0
        self._parameters = {id(p): p for p in rank_model.model.parameters()}
        self._order = {number: position for position, number in enumerate(self._parameters)}
        self._persistent = {id(p): p for p in persistent_parameters(rank_model)}
        self._blocks = set(rank_model.model.blocks.values())
        self._available: set[int] = set()
        self._inflight: set[int] = set()
        self._active: dict[int, set[nn.Module]] = defaultdict(set)
        self._active_backward: dict[nn.Module, None] = {}
        self._grads_remaining: dict[nn.Module, int] = defaultdict(int)
        self._num_available, self._whole = 0, 0
        self._mode = "invalid"
        self._modules: list[nn.Module] = []
        self._trace: list[tuple[nn.Parameter, int]] = []
        self._kept: dict[tuple[nn.Module, int], set[int]] = {}
        self._owned: dict[nn.Module, list[nn.Parameter]] = {}
        self._sizes: dict[nn.Module, tuple[frozenset[int], int]] = {}
        self._begin_pass()

    def run_step(self, num_micro_batches: int) -> tuple[int, int]:
        """Simulates one optimizer step.

        Returns:
            Number of all-gather calls, and number of gathered elements, including padding.
        """
        self.calls, self.elements = 0, 0
        rank_model = self.rank_model
        if rank_model.tied_elements and rank_model.is_first:
            self._gather_word_table()
        actions = schedule_1f1b(num_micro_batches, rank_model.stage, rank_model.num_stages, len(rank_model.chunks))
        for action in actions:
            if action.forward:
                self._forward(rank_model.chunks[action.chunk])
            else:
                self._backward(rank_model.chunks[action.chunk])
        self._step()
        return self.calls, self.elements

    # Forward pass, backward pass and recomputation.

    def _forward(self, chunk: range) -> None:
        self._reset()
        self._fetch(self.rank_model.model)
        for module in self._chunk_modules(chunk):
            self._forward_module(module)
        self._release(self.rank_model.model)
        self._grads_remaining[self.rank_model.model] = int(chunk.start > 0)

    def _forward_module(self, module: nn.Module) -> None:
        self._enter(module)
        for child in () if module in self._blocks else module.children():
            self._forward_module(child)
        self._release(module)

    def _enter(self, module: nn.Module) -> None:
        self._grads_remaining[module] = int(not self._is_input(module))
        self._fetch(module)

    def _backward(self, chunk: range) -> None:
        self._fetch_backward(self.rank_model.model)
        for module in reversed(self._chunk_modules(chunk)):
            self._backward_module(module)
        self._release_backward(self.rank_model.model)
        for module in reversed(self._active_backward):  # DeepSpeed's release_backward_leftovers
            for p in self._own(module):
                self._active[id(p)].discard(module)
                if id(p) not in self._persistent:
                    self._drop(p)
        self._active_backward.clear()

    def _backward_module(self, module: nn.Module) -> None:
        self._fetch_backward(module)
        if module not in self._blocks:
            for child in reversed(list(module.children())):
                self._backward_module(child)
        elif self.rank_model.model.recompute_blocks:
            # Recomputation stops once no saved tensor is missing, so the hook after the block never runs.
            self._enter(module)
        self._release_backward(module)

    def _step(self) -> None:
        """Simulates the optimizer's step, which ends with gathering each persistent parameter in a separate call."""
        self._inflight.clear()
        self._active.clear()
        for p in self.rank_model.model.parameters():
            self._drop(p)
        for p in self._persistent.values():
            self._count([p])
            self._available.add(id(p))

    def _gather_word_table(self) -> None:
        embeddings = self.rank_model.model.embeddings
        assert embeddings is not None
        table = embeddings.word.weight
        if id(table) not in self._available:
            self._count([table])
        self._available.discard(id(table))

    def _chunk_modules(self, chunk: range) -> list[nn.Module]:
        model = self.rank_model.model
        modules: list[nn.Module | None] = [model.embeddings] if chunk.start == 0 else []
        modules += [model.blocks[str(layer - 1)] for layer in self.rank_model.blocks_of(chunk)]
        is_last = chunk.stop == self.rank_model.config.model.num_pipeline_layers
        modules += [model.norm, model.heads] if is_last else []
        return [module for module in modules if module is not None]

    def _is_input(self, module: nn.Module) -> bool:
        """Returns whether a module is the model's embeddings or one of the layers in them. Their inputs need no
        gradient.

        DeepSpeed's hook after the backward pass never runs for such a module.
        """
        embeddings = self.rank_model.model.embeddings
        return embeddings is not None and module in (embeddings, *embeddings.children())

    # DeepSpeed's parameter coordinator; the methods have its names.

    def _begin_pass(self) -> None:
        self._queue = deque(self._trace)
        self._most_recent: dict[int, int] = defaultdict(lambda: -1)
        self._step_id = 0
        self._num_available = 0

    def _reset(self) -> None:
        """Simulates `reset_step`, which DeepSpeed calls before each forward pass."""
        self._clear_inflight()
        if self._mode == "record":
            self._trace = [
                (p, step) for step, m in enumerate(self._modules) for p in sorted(self._own(m), key=self._number)
            ]
            self._mode = "complete"
        elif self._mode == "invalid":
            self._mode = "record"
        self._begin_pass()

    def _number(self, parameter: nn.Parameter) -> int:
        return self._order[id(parameter)]

    def _trace_prologue(self, module: nn.Module) -> None:
        if self._mode == "complete" and (
            self._step_id >= len(self._modules) or self._modules[self._step_id] is not module
        ):
            self._mode, self._modules, self._trace = "invalid", [], []
            self._queue.clear()
            self._most_recent.clear()
            self._clear_inflight()
        if self._mode == "record":
            self._modules.append(module)

    def _clear_inflight(self) -> None:
        for number in self._inflight:
            self._drop(self._parameters[number])
        self._inflight.clear()

    def _fetch(self, module: nn.Module) -> None:
        self._trace_prologue(module)
        self._fetch_sub_module(module)

    def _fetch_backward(self, module: nn.Module) -> None:
        self._trace_prologue(module)
        self._active_backward[module] = None
        self._fetch_sub_module(module)

    def _fetch_sub_module(self, module: nn.Module) -> None:
        own = self._own(module)
        self._gather([p for p in own if id(p) not in self._available])
        for p in own:
            self._active[id(p)].add(module)
            self._inflight.discard(id(p))
        if self._mode == "complete":
            self._advance_queue(own)
            self._prefetch()
        self._step_id += 1

    def _advance_queue(self, own: Iterable[nn.Parameter]) -> None:
        missing = {id(p) for p in own if self._most_recent[id(p)] < self._step_id}
        passed: set[int] = set()
        while self._queue and len(passed) < len(missing):
            p, step = self._queue.popleft()
            self._most_recent[id(p)] = step
            passed.add(id(p))
        assert passed == missing, "the replay left the recorded order"

    def _prefetch(self) -> None:
        bucket = self.rank_model.zero_elements("stage3_prefetch_bucket_size")
        room = min(self.rank_model.zero_elements("stage3_max_live_parameters") - self._num_available, bucket)
        ahead: dict[int, nn.Parameter] = {}
        numel = 0
        while bucket and self._queue and numel < room:
            p, step = self._queue.popleft()
            self._most_recent[id(p)] = max(self._most_recent[id(p)], step)
            if id(p) not in self._available and id(p) not in ahead:
                ahead[id(p)] = p
                numel += p.numel()
        self._gather(list(ahead.values()))
        self._inflight |= set(ahead)

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        if parameters:
            self._count(parameters)
            self._available |= {id(p) for p in parameters}
            self._num_available += sum(p.numel() for p in parameters)
            self._whole += sum(self._padded(p) for p in parameters if id(p) not in self._persistent)
            self.peak_elements = max(self.peak_elements, self._whole)

    def _padded(self, parameter: nn.Parameter) -> int:
        return padded(parameter.numel(), self.rank_model.data_parallel_size)

    def _count(self, parameters: list[nn.Parameter]) -> None:
        self.calls += 1
        self.elements += sum(self._padded(p) for p in parameters)

    def _release(self, module: nn.Module) -> None:
        kept = self._kept_for_reuse(module) if self._mode == "complete" else set()
        for p in self._own(module):
            self._active[id(p)].discard(module)
            if id(p) not in kept:
                self._drop(p)

    def _release_backward(self, module: nn.Module) -> None:
        self._grads_remaining[module] -= 1
        if self._grads_remaining[module] == 0:
            self._active_backward.pop(module, None)
            self._release(module)

    def _drop(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._available and not self._active[id(parameter)]:
            self._available.discard(id(parameter))
            self._num_available -= parameter.numel()
            if id(parameter) not in self._persistent:
                self._whole -= self._padded(parameter)

    def _kept_for_reuse(self, module: nn.Module) -> set[int]:
        """Returns the ids of the parameters that stay gathered after a module has run.

        As in DeepSpeed, the result is cached. The cache's key is the module and its position in the recorded order of
        modules.
        """
        key = module, self._step_id
        if key not in self._kept:
            kept = {id(p) for p in self._own(module) if id(p) in self._persistent}
            kept |= {id(p) for p in self._own(module) if self._most_recent[id(p)] > self._step_id}
            self._kept[key] = kept | self._soon_used()
        return self._kept[key]

    def _soon_used(self) -> set[int]:
        used: set[int] = set()
        distance, limit = 0, self.rank_model.zero_elements("stage3_max_reuse_distance")
        for module in self._modules[self._step_id :]:
            if distance >= limit:
                break
            ids, numel = self._own_sizes(module)
            used |= ids
            distance += numel
        return used

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        """Returns the parameters that are gathered for a module.

        For a block, these are all parameters of the block. For another module, these are the module's own parameters,
        without those of child modules.
        """
        # Cached: the replay calls this method millions of times, and torch builds a new list at every call.
        if module not in self._owned:
            self._owned[module] = list(module.parameters(recurse=module in self._blocks))
        return self._owned[module]

    def _own_sizes(self, module: nn.Module) -> tuple[frozenset[int], int]:
        """Returns the ids of the parameters that are gathered for a module, and their total number of elements."""
        if module not in self._sizes:
            own = self._own(module)
            self._sizes[module] = frozenset(map(id, own)), sum(p.numel() for p in own)
        return self._sizes[module]
