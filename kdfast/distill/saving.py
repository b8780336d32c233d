"""A run's last checkpoint: all that a run needs to go on as if nothing had happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdfast.distill import parallel
from kdfast.distill.checkpoint import LAST, load, restore, save
from kdfast.distill.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from kdfast.distill.fitting import Fit

__all__ = ["Saving"]


class Saving:
    """Writes and reads ``last.pt`` of a run's folder; without a folder it does nothing.

    In data parallelism the first process writes, every process's random numbers are in it, and all of them read it: the
    folder is one that all see.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        folder = fit.distiller.folder
        self._path = None if folder is None else folder / LAST

    def save(self) -> None:
        """Raises ``OSError`` with the file's name; the checkpoint that was there is as it was."""
        if self._path is None:
            return
        student = self._fit.distiller.student
        parallel.share(student, buffers_only=True)
        mine = {"random": random_state(self._fit.position.generators), "position": self._fit.position.state_dict()}
        processes = parallel.all_of(mine)
        if parallel.is_first():
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            save(self._path, {**parts, "processes": processes})

    def go_on(self) -> None:
        """From the checkpoint, if there is one.

        Raises:
            ValueError: it is of another student, objective, optimizer or loader, naming file and part.
        """
        if self._path is None or not parallel.same(self._path.exists()):
            return
        content = load(self._path)
        parts = self._parts()
        if set(parts) != set(content) - {"version", "processes"}:
            raise ValueError(
                f"{self._path} holds {', '.join(content)}, but this run has {', '.join(parts)}: it is another one's; "
                "resume=False, or another folder, starts anew"
            )
        for name, part in parts.items():
            restore(name, part, content[name], self._path)
        processes = content["processes"]
        mine = processes[parallel.rank() % len(processes)]
        restore("loader", self._fit.position, mine["position"], self._path)
        set_random_state(mine["random"], self._fit.position.generators)

    def whereabouts(self) -> str:
        """Where the last good checkpoint is, for a message."""
        if self._path is None:
            return "no checkpoint was asked for (folder=...)"
        return f"the last checkpoint is {self._path}" if self._path.exists() else "no checkpoint had been written yet"

    def _parts(self) -> dict[str, Any]:
        """What has a state, by name."""
        fit, d = self._fit, self._fit.distiller
        parts = {
            "student": parallel.bare(d.student),
            "objective": d.objective,
            "optimizer": d.optimizer,
            "scheduler": fit.update.scheduler,
            "scaler": fit.update.scaler,
            "best": fit.best,
            "tally": fit.tally,
        }
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
