"""The step that all layerwise adaptive optimizers share: direction -> norms -> apply."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, norms, precision
from .backends import Backend, Layers
from .checks import check, check_common, check_shape
from .gather import Gathered, step_device

FUNCTION = "a function"  # what a state dict says of such a φ


class LayerwiseOptimizer(Optimizer):
    """x ← x − η · φ(‖x‖)/‖u‖ · u for every layer x, where the subclass says what the update direction u is.

    A layer is one parameter tensor, as in the authors' code. A layer whose ‖x‖ or ‖u‖ is zero takes the plain step
    η·u, and so does every layer of a group with ``adapt=False``.

    No step makes a weight or a state that is not finite. Elements of a gradient that are inf or NaN, or too large to be
    squared (1.8e19 in float32), count as 0 in the averages, and their layer stays where it is in that step. So does a
    layer whose ‖u‖ or ratio is not finite for any other reason. `trust_ratios()` says NaN for a layer that stayed. It
    goes on at its next good gradient, and no other layer notices. None of this waits for a device, or adds to what
    processes tell each other; to drop the whole step instead is for the gradient scaler or the training loop.
    """

    rule: str  # names the functions by which a backend moves this optimizer's layers
    state_keys: ClassVar[tuple[str, ...]]  # the state tensors that are shaped like the parameter
    counts_steps: ClassVar[bool]
    first_layer = 0  # how many layers come before its own: not 0 for a twin, which moves some of another's
    settings: ClassVar[tuple[str, ...]] = ("norm", "asked_backend", "state_dtype", "master_weights")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        norm: str,
        backend: str,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        check("norm", norm, norm in norms.ORDERS, f"one of {', '.join(map(repr, norms.ORDERS))}")
        narrow = precision.STATE_DTYPES
        check("state_dtype", state_dtype, state_dtype in narrow, f"one of {', '.join(map(str, narrow))}")
        self.norm = norm
        self.asked_backend = backend
        self.state_dtype = state_dtype
        self.master_weights = master_weights
        # Of each device: its layers, and the vector of their ratios. A compiled step would lose an assignment
        # to the attribute, so that what it assigns to is the list's one element.
        self._ratios: list[list[tuple[Layers, Tensor]]] = [[]]
        self._gathered: Gathered | None = None
        super().__init__(params, defaults)

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return what ``closure``, if one is given to compute them, does."""
        if self.counts_steps:
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reported: list[tuple[Layers, Tensor]] = []
        for layers in self._layers_by_device():
            reported.append((layers, self._move(layers)))
            if not torch.compiler.is_compiling():
                layers.release()
        self._ratios[0] = reported
        return loss

    def _move(self, layers: Layers) -> Tensor:
        """Move the layers of one device, and return their trust ratios."""
        backend = self._backend_now()
        if backend.by_layer:
            layers.spread()
        ratios = backend.step(self.rule, layers, self.norm) if layers.whole else None
        if ratios is not None:
            return ratios
        local, memory = backend.direction(self.rule, layers, self.norm)
        x_norms, u_norms = norms.combine(local, [layer.cut for layer in layers], self.norm).unbind()
        ratios = norms.trust_ratios(x_norms, u_norms, [run.ratio for run in layers.runs for _ in range(run.num_layers)])
        backend.apply(self.rule, layers, ratios, memory)
        for layer in layers:
            if layer.rounded is not None:
                precision.store_weights([layer.rounded], [layer.x])
        return ratios

    def _ratio(self, group: dict[str, Any]) -> norms.Ratio | None:
        """Say how the layers of a group that adapts get their factor; None if they do not adapt after all."""
        return norms.Ratio(self._phi(group))

    def _phi(self, group: dict[str, Any]) -> norms.Phi:
        """Return the φ of a group; where only a state dict's word for it came, past `load_state_dict`, the default."""
        if group["phi"] != FUNCTION:
            return group["phi"]  # type: ignore[no-any-return]
        default: norms.Phi = self.defaults["phi"]
        check("phi", FUNCTION, callable(default), "the φ itself, which a state dict does not hold: give it anew")
        return default

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the trust ratio of every layer that the last step moved; no part of the state dict.

        The keys are the parameters' names if the optimizer was given names (by `param_groups`, or as named
        parameters; one that comes again gets "#2"), else their positions in the order of the groups. The values are 0-D
        tensors on the layer's device: nothing here waits for it. A layer that does not adapt has 1, and one that had to
        stay where it was (a gradient with inf or NaN) has NaN. Empty before the first step.
        """
        return norms.by_name(
            (layer.name, ratio)
            for layers, ratios in self._ratios[0]
            for layer, ratio in zip(layers, ratios.unbind(), strict=True)
        )

    @property
    def backend(self) -> str:
        """Name the code that moves the layers, which ``backend="auto"`` leaves the optimizer to choose."""
        return self._backend.name

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell `torch.amp.GradScaler` that a step divides the gradients by ``grad_scale`` and skips on ``found_inf``.

        The scaler then sets both and never waits for the device. The gradients stay as they are, scaled.
        """
        on_device = not self.counts_steps or all(group["capturable"] for group in self.param_groups)
        return self._backend.takes_scaling and on_device and not torch.compiler.is_compiling()

    def _backend_now(self) -> Backend:
        """Return the backend to use: that of torch operations where `torch.compile` traces the step."""
        return self._traceable_backend if torch.compiler.is_compiling() else self._backend

    # ---- what a step works on ----

    def _layers_by_device(self) -> list[Layers]:
        """Gather the parameters that have a gradient, their step counted, device by device."""
        grads = [x.grad for group in self.param_groups for x in group["params"]]
        backend, gathered = self._backend_now(), self._gathered
        if torch.compiler.is_compiling():
            gathered = Gathered(self, grads)
        elif gathered is None or not gathered.is_of(self, grads):
            self._choose_backend()  # the parameters may have moved to another device since they were given
            backend, gathered = self._backend, Gathered(self, grads)
            self._gathered = gathered
        gathered.fill(self, grads, backend)
        return list(gathered.by_device.values())

    def _hyper(self, group: dict[str, Any], t: Any) -> Any:
        """Return the rule's numbers for the t-th step of a layer of ``group``."""
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any]) -> None:
        """Make what is missing of the state of the parameters that have a gradient.

        Under this name `torch.compile` calls it instead of tracing it, as it does for torch's own optimizers.
        """
        for x in group["params"]:
            if x.grad is None:
                continue
            state = self.state[x]
            if self.counts_steps and "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(x, group))
            for key in self.state_keys:
                if key not in state:
                    state[key] = torch.zeros_like(x, dtype=precision.state_dtype(x, self.state_dtype))
            if self.master_weights and x.dtype.itemsize < 4 and "master_param" not in state:
                state["master_param"] = x.detach().float()

    # ---- groups and state dicts ----

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting out of range."""
        check_common(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for x in self.param_groups[-1]["params"]:
                check("params", x.dtype, not x.is_complex(), "real parameters; complex ones are not supported")
                norms.parts(x, None, 0)
            self._choose_backend()
        except ValueError:
            self.param_groups.pop()
            raise

    def _choose_backend(self) -> None:
        params = [norms.local(x) for group in self.param_groups for x in group["params"]]
        self._backend = backends.choose(self.asked_backend, self.rule, params)
        self._traceable_backend = self._backend if self._backend.compiles else backends.load("foreach")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of an older version, or of another optimizer
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch's __setstate__ adds, and which means nothing here
                    group.setdefault(key, value)
        self._ratios, self._gathered = [[]], None
        self._choose_backend()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, but for a φ that is a function, and is only said to be one.

        Functions cannot always be saved, and are not safe to load: loading leaves a group its own.
        """
        return without_functions(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of a torch optimizer with the same state keys.

        Settings that its groups lack stay as they are in the group here. The tensors keep the dtype that this optimizer
        gives its state, where torch would round them to the parameter's.

        Raises:
            ValueError: groups or shapes that do not match, moments without their step count, or another rule's state;
                nothing is changed then.
        """
        as_loaded: dict[str, Any] = {}

        def complete(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            states = {
                number: {key: value for key, value in state.items() if value is not None}  # SGD's without momentum
                for number, state in loaded["state"].items()
            }
            for state in states.values():
                self._check_state(state)
            pairs = zip(loaded["param_groups"], self.param_groups, strict=False)  # torch says if there are too few
            groups = [self._completed(group, own) for group, own in pairs]
            as_loaded.update(loaded, state=states, param_groups=groups + loaded["param_groups"][len(groups) :])
            self._check_shapes(as_loaded)
            return as_loaded

        def keep_dtypes(_: Any) -> None:
            for x, group, loaded in self._pairs(as_loaded):
                state = self.state.get(x, {})
                for key in (*self.state_keys, "master_param"):
                    if key in loaded:
                        dtype = torch.float32 if key == "master_param" else precision.state_dtype(x, self.state_dtype)
                        state[key] = loaded[key].detach().to(x.device, dtype, copy=True)
                if self.counts_steps and state:
                    step = torch.as_tensor(state["step"], dtype=torch.float32, device=step_device(x, group))
                    state["step"] = step.clone()

        handles = (
            self.register_load_state_dict_pre_hook(complete),  # after the user's
            self.register_load_state_dict_post_hook(keep_dtypes, prepend=True),  # before the user's
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _pairs(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Return each parameter that a state dict has a place for, its group, and the state that is to be its own."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [(x, group) for group in self.param_groups for x in group["params"]]
        states = [state_dict["state"].get(number, {}) for number in numbers]
        return [(x, group, state) for (x, group), state in zip(params, states, strict=False)]

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError for moments of a parameter that has another shape here; of groups torch says more."""
        both = state_dict["param_groups"], self.param_groups
        sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in both)
        if sizes != own_sizes:
            return
        for position, (x, _, state) in enumerate(self._pairs(state_dict)):
            for key in (*self.state_keys, "master_param"):
                if isinstance(state.get(key), Tensor):
                    check_shape(key, position, norms.local(state[key]), norms.local(x))

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a loaded state that is not this rule's."""
        if state:
            found = sorted(map(str, state))
            check("state_dict", found, not self.counts_steps or "step" in state, "a step count beside every state")
            check("state_dict", found, state.keys() >= set(self.state_keys), f"{' and '.join(self.state_keys)}")

    def _completed(self, group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return a loaded group with the settings that it lacks, from the group whose place it takes."""
        theirs = with_own_functions(dict(group), own)
        if "always_adapt" not in theirs:  # torch's Adam, RAdam and NAdam, which mean by it what LAMB does in any case
            theirs.pop("decoupled_weight_decay", None)
        return {key: own[key] for key in self.defaults if key in own} | theirs


def without_functions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put `FUNCTION` in place of every φ that is a function in a state dict, which is changed."""
    for group in state_dict["param_groups"]:
        if callable(group.get("phi")):
            group["phi"] = FUNCTION
    return state_dict


def with_own_functions(loaded: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a loaded group, with the φ of the group whose place it takes where that was a function."""
    return loaded | {"phi": own["phi"]} if loaded.get("phi") == FUNCTION else loaded


def rate_of(group: dict[str, Any]) -> float | Tensor:
    """Return the group's learning rate, a number or a 0-D tensor; torch takes tensors of one element in any shape."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr
