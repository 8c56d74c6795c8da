"""What optimizers around another optimizer have in common: groups, state and state dict are the other's."""

from typing import Any

from torch.optim import Optimizer


class Wrapper(Optimizer):
    """An optimizer around ``base``, made by a `__setstate__` with it instead of by `Optimizer.__init__`."""

    base: Optimizer

    def _follow_base(self) -> None:
        """Take over what has changed in the base optimizer's groups."""
        self._num_groups = len(self.param_groups)

    def _follow_new_groups(self) -> None:
        """Notice groups that were added through the base optimizer."""
        if len(self.param_groups) != self._num_groups:
            self._follow_base()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        groups: list[dict[str, Any]] = self.base.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the base optimizer."""
        self.base.add_param_group(param_group)
        self._follow_base()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict."""
        state_dict: dict[str, Any] = self.base.state_dict()
        return state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in vars(self):  # a hook on either's state dict is a hook on both
            if name.endswith(("state_dict_pre_hooks", "state_dict_post_hooks")):
                setattr(self, name, getattr(self.base, name))
        self._follow_base()
