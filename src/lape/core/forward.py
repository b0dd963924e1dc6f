"""A forward of a converted model: its grid is told once, positions are computed once, for all layers, in one place.

The root of a converted model opens a `Forward` around its own forward, in its thread. As soon as the grid is known, the
module `root.lape` computes what every layer receives (without gradients, each when its layer asks); the joined modules
take their share. Called outside of such a forward (a block by hand, a backward that recomputes activations) a module
has its share computed anew.

The host's table stays in its slot under its own key. Where it is joined elsewhere, it reads as zeros while the host's
own code adds it, in that thread, and as itself to everybody else.

Shape legend: B batch, N tokens, R rows of the position table, D width, H heads.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lape.core.anatomy import Anatomy, owner_and_name
from lape.core.constants import constant
from lape.core.grids import Recall, in_backward, pick, rows_of_patches, wrong_number_error
from lape.core.joined import Joined
from lape.core.position import Grid, same_grid
from lape.errors import LapeError


@dataclass(frozen=True)
class PositionRequest:
    """The positions of a grid, as they are asked of `model.lape`."""

    table: Tensor | None  # P (1, R, D) of the model's own grid, where the host has one
    anatomy: Anatomy
    merge: Callable[[int, Tensor], Tensor]  # (layer, position) -> the position as that block gets it
    grid: Grid | None = None  # None: the model's own
    last_place: int | None = None  # the last place that is needed; None: all

    @property
    def count(self) -> int | None:
        """How many places are needed, None for all."""
        return None if self.last_place is None else self.last_place + 1


class Forward:
    """One forward, while it runs: its grid, and the positions that its layers receive."""

    __slots__ = ("entry", "grid", "grids", "late", "learns", "link", "positions", "root", "rows_BK", "table")

    def __init__(self, link: Link, root: nn.Module, entry: str):
        self.link = link
        self.entry = entry  # the method by which it began
        self.root = root  # a replica of the link's own under nn.DataParallel
        self.grid: Grid | None = None  # None: the model's own
        self.grids: list[Grid] | None = None  # of each image, where these are packed
        self.table: Tensor | None = None  # the host's, as its own code has read it
        self.positions: tuple[Tensor, ...] | _OneByOne | None = None  # by place, where there is something to compute
        self.rows_BK: Tensor | None = None  # which of them each image picks, where patches are shuffled
        self.learns = False  # whether `positions` carry gradients
        self.late = False  # whether positions wait until asked for: the table is offloaded until the host reads it

    def begin(self, grid: Grid | None) -> None:
        """The grid is known. With gradients, positions are computed at once, before a block can be checkpointed."""
        self.grid = grid
        if not self.link.listed:
            return
        table = self.link.table(self.root)
        self.late = table is not None and table.is_meta  # offloaded: elsewhere until the host's code reads it
        if not self.late:
            self.compute(table)

    def begin_each(self, grids: list[Grid], num_tokens: int) -> None:
        """The grid of each image is known."""
        self.grids, self.learns = grids, torch.is_grad_enabled()
        if self.link.listed:
            self.positions = self.link.compute_each(self.root, grids, num_tokens)

    def compute(self, table: Tensor | None) -> None:
        self.learns = torch.is_grad_enabled()
        request = self.link.request(self.root, self.grid, table=table)
        lape: Any = self.root.lape
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.learns or traced or not _may_be_lazy(lape):
            self.positions = lape(request)
        else:
            self.positions = _OneByOne(lape.each(request))


def _may_be_lazy(module: Any) -> bool:
    """Whether a way can compute place by place, and nothing is around it that must see it called: hooks, a wrapper,
    another forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return getattr(type(module), "lazy", False) and not hooks and "forward" not in module.__dict__


class _OneByOne:
    """Positions of a forward without gradients, each computed when its layer asks; only the last is kept.

    At batch 1 on a CPU, memory that is new costs more than the norms.
    """

    def __init__(self, positions: Iterator[Tensor]):
        self.positions = positions
        self.place = -1
        self.last: Tensor | None = None

    def __getitem__(self, place: int) -> Tensor | None:
        """None for a place that has been passed."""
        while self.place < place:
            self.last = next(self.positions)
            self.place += 1
        return self.last if self.place == place else None


class _Thread(threading.local):
    """What runs in this thread. Set in `__init__`: torch.compile guards on what is there when it looks."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.adding_depth = 0  # how many methods that add a table are under way
        self.traced_zeros: Tensor | None = None  # what they see in a graph that is being made
        self.rotation: tuple[Any, Tensor] | None = None  # the attention that runs, cosine and sine, where rotary


THREAD = _Thread()


class Link:
    """What the joined modules of one model share: the way to the model and its parts, and what forwards told.

    No module, so that nothing is registered twice. A copy of the whole model has its own; a copy of one module alone
    (as adapters make it) goes on with this one.
    """

    def __init__(self, root: nn.Module, host: str, anatomy: Anatomy, *, listed: bool):
        self.root = root
        self.host = host
        self.anatomy = anatomy
        self.listed = listed  # `Way.computes_positions` of `root.lape`; pickled under this name
        self.recall = Recall()
        self.replaced: dict[str, nn.Parameter] = {}  # path -> the host's parameter that is not used, see convert.ways
        self.orders: dict[str, tuple[str, ...]] = {}  # path -> names of the host's parameters there, in their order

    def idle_paths(self) -> set[str]:
        """Paths of what the host has no use for at present, and keeps as buffers."""
        owners = {path: owner_and_name(self.root, path) for path in self.replaced}
        return {path for path, (owner, name) in owners.items() if name in owner._buffers}

    @property
    def many_grids(self) -> bool:
        """Whether the grid may differ from forward to forward."""
        return self.anatomy.patch_embed is not None

    def table(self, root: nn.Module) -> Tensor | None:
        """The table in the host's slot, (1, R, D)."""
        if self.anatomy.table_slot is None:
            return None
        table: Tensor | None = member(*owner_and_name(root, self.anatomy.table_slot))
        return None if table is None else self.read(root, table)

    def read(self, root: nn.Module, table: Tensor) -> Tensor:
        """The rows (1, R, D) that a host's table stands for."""
        return rows_of_host(root, self.anatomy, table)

    def request(
        self, root: nn.Module, grid: Grid | None, last_place: int | None = None, *, table: Tensor | None = None
    ) -> PositionRequest:
        table = self.table(root) if table is None else table
        return PositionRequest(table, self.anatomy, partial(self.anatomy.merge, root), grid, last_place)

    def compute(self, root: nn.Module, grid: Grid | None, last_place: int | None = None) -> tuple[Tensor, ...]:
        """What each joined place receives, or those up to one, (1, N, D), for calls outside of a forward."""
        positions: tuple[Tensor, ...] = root.lape(self.request(root, grid, last_place))  # type: ignore[operator]
        return positions

    def compute_each(
        self, root: nn.Module, grids: list[Grid], num_tokens: int, last_place: int | None = None
    ) -> tuple[Tensor, ...]:
        """As `compute`, image by image, (B, N, D). What tokens behind the last patch of an image receive is zero."""
        model_grid = self.anatomy.layout.grid
        positions = {
            grid: self.compute(root, None if grid == model_grid else grid, last_place) for grid in dict.fromkeys(grids)
        }
        places = list(zip(*(positions[grid] for grid in grids), strict=True))
        if any(p.ndim != 3 for p in places[-1]):
            raise _one_grid_error()
        return tuple(torch.cat([F.pad(p, (0, 0, 0, num_tokens - p.shape[1])) for p in each]) for each in places)

    @property
    def running(self) -> nn.Module:
        """The root, or that replica of it whose forward runs in this thread."""
        forward = THREAD.forward
        return forward.root if forward is not None and forward.link is self else self.root

    def grid_of(self, x: Tensor, layer: int = 0) -> Grid | None:
        """The grid of a block's tokens or map, in a forward or outside of one; None for the model's own."""
        anatomy, forward = self.anatomy, THREAD.forward
        if anatomy.maps:
            return None if tuple(x.shape[1:3]) == anatomy.at(layer)[0].grid else (x.shape[1], x.shape[2])
        if forward is not None and forward.link is self:
            if forward.grids is not None:
                raise _one_grid_error()
            return forward.grid
        if anatomy.shuffle is not None or not self.many_grids:
            return None
        if anatomy.windows is not None:
            grid = self.recall.only(anatomy.layout)
            return None if grid == anatomy.layout.grid else grid
        return self.recall.grid(anatomy.layout, x.shape[1])

    def recompute(self, place: int, x: Tensor) -> Tensor:
        """What one joined place receives for tokens x, computed anew: no forward runs, or it holds no position that can
        be used."""
        anatomy, forward = self.anatomy, THREAD.forward
        grids = forward.grids if forward is not None and forward.link is self else None
        if anatomy.packed_grids is not None and in_backward():
            grids = self.recall.last_note(x.device)
        with _saved_as_it_is(), _unseen_in_backward():
            if grids is not None:
                return self.compute_each(self.running, grids, x.shape[1], place)[place]
            p = self.compute(self.running, self.grid_of(x, place), place)[place]
            if anatomy.shuffle is not None:
                patches_Bk = self.recall.patches(anatomy.layout, x.device, x.shape[1])
                p = pick(p, rows_of_patches(anatomy.layout, patches_Bk))
        return p

    def tell(self, grid: Grid) -> None:
        """The forward of this thread has this grid."""
        if type(grid[0]) is int and type(grid[1]) is int and not torch.compiler.is_compiling():
            self.recall.note(grid)
        if (forward := THREAD.forward) is not None and forward.link is self:
            forward.begin(None if same_grid(grid, self.anatomy.layout.grid) else grid)

    def tell_each(self, grids: list[Grid], num_tokens: int) -> None:
        """The images of the forward of this thread have these grids."""
        if (forward := THREAD.forward) is not None and forward.link is self:
            forward.begin_each(grids, num_tokens)

    def tell_patches(self, patches_Bk: Tensor, tokens_BkD: Tensor) -> None:
        """The forward of this thread goes on with these patches, numbered on the grid row by row, as these tokens."""
        self.recall.note_forward(patches_Bk, tokens_BkD)
        if (forward := THREAD.forward) is not None and forward.link is self:
            rows_BK = rows_of_patches(self.anatomy.layout, patches_Bk)
            if isinstance(forward.positions, tuple):  # now, before a block can be checkpointed
                forward.positions = tuple(pick(p, rows_BK) for p in forward.positions)
            else:
                forward.rows_BK = rows_BK

    def stand_in(self, value: Any) -> Any:
        """What the host's code sees in its slot while it adds: zeros, or a table that it lacks."""
        if value is None:
            return self.running.lape()  # type: ignore[operator]
        if isinstance(value, nn.Module):
            return None
        forward = THREAD.forward
        if forward is not None and forward.link is self and forward.late and not self.anatomy.form.inputs:
            forward.table = self.read(forward.root, value)
        if isinstance(value, nn.Parameter):
            return _zeros(value, value.dtype)
        dtypes = [p.dtype for module in self.running.modules() for p in module._parameters.values() if p is not None]
        return _zeros(value, dtypes[0] if dtypes else value.dtype)  # an idle buffer: the dtype of the parameters in use

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        root = memo.get(id(self.root))
        if root is None:
            return self
        memo[id(self)] = link = Link(root, self.host, replace(self.anatomy, root=root), listed=self.listed)
        link.replaced, link.orders = copy.deepcopy(self.replaced, memo), dict(self.orders)
        return link

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "recall"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, recall=Recall())


def rows_of_host(root: nn.Module, anatomy: Anatomy, table: Tensor) -> Tensor:
    """The rows (1, R, D) that a host's table stands for."""
    return anatomy.form.read(table, *(member(*owner_and_name(root, path)) for path in anatomy.form.inputs))


def tokens_keyword(kwargs: dict[str, Any]) -> str:
    """The name under which a module was handed its tokens."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def position_for(module: Any, x: Tensor, layer: int | None = None) -> Tensor:
    """What a joined module's tokens x receive, (1, N, D) or for a map (1, rows, columns, D), in their dtype.

    `layer`: the layer in whose order the tokens stand (windows), -1 before the first; None: that of the module's place.
    """
    link, place = module._lape, module._lape_place
    p = _from_forward(link, place, x)
    if p is None:
        p = link.recompute(place, x)
    if link.anatomy.maps:
        p = p.unflatten(1, x.shape[1:3])
    if link.anatomy.windows is not None:
        p = _in_windows(link, p, x, place if layer is None else layer)
    if isinstance(x, Tensor) and (p.dtype != x.dtype or p.device != x.device):  # else a proxy of torch.fx
        p = p.to(device=x.device, dtype=x.dtype)
    return p


def _from_forward(link: Link, place: int, x: Tensor) -> Tensor | None:
    """What the forward of this thread holds for a place, as tokens x can use it; None where it has nothing for them."""
    forward = THREAD.forward
    if forward is None or forward.link is not link:
        return None
    if forward.late:
        forward.late = False
        with _saved_as_it_is():
            forward.compute(forward.table)
    if forward.positions is None or (torch.is_grad_enabled() and not forward.learns):
        return None
    if isinstance(forward.positions, _OneByOne) and torch.compiler.is_compiling():
        return None
    if link.anatomy.maps and link.grid_of(x, place) != forward.grid:
        return None
    p = forward.positions[place]
    return p if p is None or forward.rows_BK is None else pick(p, forward.rows_BK)


def _in_windows(link: Link, p_1ND: Tensor, x: Tensor, layer: int) -> Tensor:
    """A position as the tokens x of a block stand: a map, windows image by image, or all of an image's at once."""
    anatomy = link.anatomy
    grid = link.grid_of(x, layer) or anatomy.at(layer)[0].grid
    if x.ndim == 4 and tuple(x.shape[1:3]) == grid:
        p: Tensor = p_1ND.unflatten(1, grid)
        return p
    assert anatomy.windows is not None
    p = anatomy.windows(p_1ND, grid, layer)
    if p.shape[1:] != x.shape[1:]:
        return p.flatten(0, 1)[None]
    return p if len(p) == 1 else p.repeat(x.shape[0] // len(p), *(1 for _ in p.shape[1:]))


def _one_grid_error() -> LapeError:
    return LapeError(
        "images of several grids, or padded ones, are packed in this batch, and this kind of position is for one grid: "
        "give images (B, C, height, width) of one size, or use pe='learnable'"
    )


def check_token_count(module: Any, x: Tensor, p: Tensor) -> None:
    """Raises LapeError unless p is for as many tokens as x has."""
    if isinstance(x, Tensor) and not torch.jit.is_tracing() and p.shape[1] != x.shape[1]:  # it would be broadcast
        raise wrong_number_error(module._lape.anatomy.layout, x.shape[1])


def member(owner: nn.Module, name: str) -> Any:
    """What lies in a module under a name: a parameter, a buffer, a module, or what a replica has in their place."""
    for place in (owner._parameters, owner._buffers, owner._modules, owner.__dict__):
        if name in place:
            return place[name]
    if name in owner._modules.get("parametrizations", ()):  # type: ignore[operator]
        raise LapeError(f"{name} is parametrized, so that it can't be joined: remove the parametrization first")
    raise AttributeError(f"{type(owner).__name__} has no {name!r}")


class Spanning(Joined):
    """The root of a converted model: a `Forward` spans each of its forwards."""

    def _around(self, host_method: Any, *args: Any, **kwargs: Any) -> Any:
        root: Any = self
        link, outer = root._lape, THREAD.forward
        entry = host_method.__name__
        if outer is not None and outer.root is root and outer.entry != entry:  # forward calls forward_features
            return host_method(self, *args, **kwargs)
        THREAD.forward = forward = Forward(link, root, entry)
        try:
            if not link.many_grids:
                forward.begin(None)
            return host_method(self, *args, **kwargs)
        finally:
            THREAD.forward = outer


class Adding(Joined):
    """The module whose method adds the host's table."""

    def _around(self, host_method: Any, *args: Any, **kwargs: Any) -> Any:
        THREAD.adding_depth += 1
        try:
            if torch.compiler.is_compiling():
                check_hidden(self._lape)  # type: ignore[attr-defined]
            return host_method(self, *args, **kwargs)
        finally:
            THREAD.adding_depth -= 1
            THREAD.traced_zeros = None


class Slot(Joined):
    """The owner of the host's table, which hides it while the host's code adds it."""

    @classmethod
    def takes_over(cls, host: type, name: str) -> Any:
        def read(self: Any) -> Any:
            value = member(self, name)
            return self._lape.stand_in(value) if THREAD.adding_depth else value

        def write(self: Any, value: Any) -> None:
            self.__dict__[name] = value

        def delete(self: Any) -> None:
            del self.__dict__[name]

        return property(read, write, delete)


def check_hidden(link: Link) -> None:
    """Raises LapeError where a tracer reads parameters past the class that hides them, so that they would be added."""
    if link.anatomy.table_slot is None:
        return
    owner, name = owner_and_name(link.running, link.anatomy.table_slot)
    if isinstance(owner, Slot) and getattr(owner, name) is member(owner, name):
        raise LapeError("a strict torch.export of torch 2.6 does not see that the table is hidden: pass strict=False")


def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the form of a tensor: a view of one kept zero; in a graph, one node."""
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return constant(_zero, like.device, dtype).expand(like.shape)
    if THREAD.traced_zeros is None or THREAD.traced_zeros.shape != like.shape:
        THREAD.traced_zeros = torch.zeros_like(like, dtype=dtype)
    return THREAD.traced_zeros


def _saved_as_it_is() -> Any:
    """In here tensors that autograd saves pass no outer hook: a checkpoint must not count those of a position, which
    the forward computed before its first block."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _unseen_in_backward() -> Any:
    """Nor may selective checkpointing, which counts operations by a dispatch mode, find more of them than before."""
    return _disable_current_modes() if in_backward() else contextlib.nullcontext()
