"""A round of array operations -> a recipe for matrices of one shape: operations, and buffers between them.

Transposes are not computed: every value is stored the way round in which its readers want it, and others read
it turned. A product with what is added to it is one operation. Buffers are used again after their last read.
"""

import dataclasses
from collections.abc import Sequence

from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr, order
from optimisers.graph.plan import Round
from optimisers.graph.shapes import elements, exchanged, shape_of
from optimisers.graph.trace import Program
from optimisers.ops.dispatch import OPERATIONS

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """What an operation reads: the value with this number, transposed or not; or a scalar."""

    value: int
    turned: bool = False
    scalar: Expr | None = None
    constant: Expr | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One thing for the array library to do, for all matrices of a stack at once."""

    kind: str
    """`product`: alpha a @ b + beta c; `apply`: the operation of a node; `reduce`: to one number a leaf."""
    node: Expr
    args: tuple[Operand, ...]
    out: int
    """The number of its value."""
    register: int
    """Which buffer of the workspace holds it; -1 for an output of the recipe."""
    shape: Shape | None
    """Of one matrix; None where only the array library knows."""
    alpha: tuple[Expr, ...] = ()
    beta: tuple[Expr, ...] = ()
    """Factors of a product and of what is added to it, multiplied with each other."""
    signs: tuple[int, int] = (1, 1)
    spare: int = -1
    """A register for c, where the library cannot add while it multiplies."""
    dtype: str | None = None
    """In which type a product is taken; None for that of the arithmetic."""

    @property
    def is_free(self) -> bool:
        """Whether the library makes an array of its own for it, or sees another one."""
        return self.kind == "apply" and OPERATIONS[self.node.op].family in ("shape", "made")


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A round for matrices of one shape."""

    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    """The number of every input of the round."""
    older: tuple[tuple[Expr, int], ...]
    """(value of another round or of the state, its number)."""
    outputs: tuple[tuple[Expr, Operand], ...]
    """Every wanted node, and where it is found."""
    registers: int
    flops: int
    """Of all products, for one matrix."""
    elements: int
    """What all operations read and write, for one matrix."""


@cached
def recipe(what: Round, shape: Shape) -> Recipe:
    """The recipe of a round for leaves of this shape; made once."""
    return _Writer(what, shape).written()


def _elementwise(e: Expr) -> bool:
    return OPERATIONS[e.op].family == "elementwise" if e.op in OPERATIONS else False


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """A sum of a product and another value, each with factors."""

    value: Expr
    turned: bool
    factors: tuple[Expr, ...]
    other: Expr
    other_turned: bool
    other_factors: tuple[Expr, ...]
    signs: tuple[int, int]


class Shapes:
    """The shapes of the values of one leaf."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.found: dict[int, Shape | None] = {}

    def known(self, e: Expr) -> Shape | None:
        """The shape of a value; None if only the array library knows."""
        if e.domain == "scalar":
            return ()
        if e.domain == "array":
            return self.shape
        for node in order([e], self.found, given=True):
            if node.domain == "free":
                self.found[id(node)] = self.shape_of(node)
        return self.found[id(e)]

    def shape_of(self, e: Expr) -> Shape | None:
        """The same for a node whose arguments are known."""
        if e.op in ("input", "const"):
            return e.shape_
        here = {"scalar": (), "array": self.shape}
        args = [here[a.domain] if a.domain in here else self.found[id(a)] for a in e.args]
        shapes = [a for a in args if a is not None]
        return None if len(shapes) < len(args) else shape_of(e.op, dict(e.options), shapes)


@cached
def misfit(program: Program, shape: Shape) -> str:
    """What a rule stores in another shape than that of its place, for parameters of this shape; empty if
    that is nothing, or only the array library knows.
    """
    known = Shapes(shape).known
    for what, e, own in stores_free(program):
        want, got = shape if own is None else own, known(e)
        if got not in (None, want):
            return f"{what} of shape {got} where one of shape {want} goes"
    return ""


@cached
def stores_free(program: Program) -> list[tuple[str, Expr, Shape | None]]:
    """(what it is, node, its shape where it is not that of x) for what is stored and may have any shape."""
    slots = zip(program.slots, program.new_slots, strict=True)
    places = [("a step", program.change, None), *(("a state", e, slot.shape) for slot, e in slots)]
    return [(what, e, shape) for what, e, shape in places if e is not None and e.domain == "free"]


class _Writer:
    """Writes the recipe of one round."""

    def __init__(self, what: Round, shape: Shape) -> None:
        self.what = what
        self.known = Shapes(shape).known
        self.mine = {id(e) for e in what.nodes}
        self.readers: dict[int, list[Expr]] = {}
        for e in what.nodes:
            for a in e.args:
                self.readers.setdefault(id(a), []).append(e)
        self.wanted = {id(e) for e in what.wanted} | {id(r.args[0]) for r in what.reductions}
        self.flip = self.flips()
        self.numbers: dict[int, int] = {}
        self.out: list[Operation] = []
        self.inside: set[int] = set()

    # -- which way round --

    def base(self, e: Expr) -> tuple[Expr, bool]:
        """A value under its transposes, and whether it is turned by them."""
        turned = False
        while e.op == "transpose" and id(e) in self.mine and self.known(e) is not None:
            e, turned = e.args[0], not turned
        return e, turned

    def turnable(self, e: Expr) -> bool:
        """Whether a node can be computed the other way round."""
        shape = self.known(e)
        if shape is None or len(shape) < 2:
            return False
        if e.op == "matmul":
            return True
        args = [self.known(a) for a in e.args if a.domain != "scalar"]
        return _elementwise(e) and all(a is not None and len(a) == len(shape) for a in args)

    def flips(self) -> dict[int, bool]:
        """Which nodes are computed transposed: as those wish who read them element by element."""
        wish: dict[int, bool] = {}
        for e in (*self.what.wanted, *(r.args[0] for r in self.what.reductions)):
            base, turned = self.base(e)
            wish.setdefault(id(base), turned)
        flip: dict[int, bool] = {}
        for e in reversed(self.what.nodes):
            if self.base(e)[0] is not e:
                continue
            flip[id(e)] = wish.get(id(e), False) if self.turnable(e) else False
            if _elementwise(e):
                for a in e.args:
                    if id(a) in self.mine:
                        base, turned = self.base(a)
                        wish.setdefault(id(base), turned != flip[id(e)])
        return flip

    def operand(self, a: Expr, turned: bool) -> Operand:
        """A value as an operation reads it, transposed or not."""
        if a.domain == "scalar":
            return Operand(-1, scalar=a)
        base, more = self.base(a)
        if base.op == "const":
            return Operand(-1, turned != more, constant=base)
        return Operand(self.number(base), turned ^ more ^ self.flip.get(id(base), False))

    def number(self, e: Expr) -> int:
        return self.numbers.setdefault(id(e), len(self.numbers))

    # -- products with what is added to them --

    def term(self, e: Expr, owner: Expr) -> tuple[Expr, bool, int, tuple[Expr, ...]]:
        """(value, transposed, sign, factors) of a term that its sum alone reads."""
        sign, factors, turned = 1, list[Expr](), False
        reader = owner
        while self.alone(e, reader):
            if e.op == "negative":
                sign, reader, e = -sign, e, e.args[0]
            elif e.op == "multiply" and any(a.domain == "scalar" for a in e.args):
                at = 0 if e.args[0].domain == "scalar" else 1
                factors.append(e.args[at])
                reader, e = e, e.args[1 - at]
            elif e.op == "transpose" and self.base(e)[0] is not e:
                turned = not turned
                reader, e = e, e.args[0]
            else:
                break
        return e, turned, sign, tuple(factors)

    def alone(self, e: Expr, reader: Expr) -> bool:
        """Whether a node is computed for one reader only."""
        return (
            id(e) in self.mine
            and id(e) not in self.wanted
            and len(self.readers.get(id(e), ())) == 1
            and self.readers[id(e)][0] is reader
        )

    def sum_of(self, e: Expr) -> "_Sum | None":
        """A node as `alpha a @ b + beta c`, if it is one."""
        shape = self.known(e)
        if e.op not in ("add", "subtract") or shape is None or any(a.domain == "scalar" for a in e.args):
            return None
        terms = [self.term(a, e) for a in e.args]
        if e.op == "subtract":
            value, turned, sign, factors = terms[1]
            terms[1] = (value, turned, -sign, factors)
        for product, other in (terms, terms[::-1]):
            (value, turned, sign, factors), (c, c_turned, c_sign, c_factors) = product, other
            lonely = value.op == "matmul" and id(value) in self.mine and len(self.readers[id(value)]) == 1
            same = _turned(self.known(value), turned) == shape == _turned(self.known(c), c_turned)
            real = all(a.type == "real" for a in (e, value, c, *factors, *c_factors))
            if lonely and id(value) not in self.wanted and same and real:
                return _Sum(value, turned, factors, c, c_turned, c_factors, (sign, c_sign))
        return None

    def swallowed(self, e: Expr, product: Expr) -> set[int]:
        """The nodes of a sum that its one operation stands for."""
        found: set[int] = set()
        for term in e.args:
            a, reader = term, e
            while self.alone(a, reader) and (a.op in ("negative", "transpose") or _scaled(a)):
                found.add(id(a))
                reader, a = a, next(b for b in a.args if b.domain != "scalar")
        return found | {id(product)}

    def factors_of(self, e: Expr, turned: bool) -> tuple[Operand, Operand]:
        """The factors of a product, or of its transpose: those in turn, each transposed."""
        a, b = e.args[::-1] if turned else e.args
        return self.operand(a, turned), self.operand(b, turned)

    # -- writing --

    def write(
        self,
        kind: str,
        e: Expr,
        args: tuple[Operand, ...],
        alpha: tuple[Expr, ...] = (),
        beta: tuple[Expr, ...] = (),
        signs: tuple[int, int] = (1, 1),
        dtype: str | None = None,
    ) -> None:
        shape = self.known(e)
        if kind != "reduce" and self.flip.get(id(e), False):
            shape = _turned(shape, True)
        number = -1 if kind == "reduce" else self.number(e)
        self.out.append(Operation(kind, e, args, number, 0, shape, alpha, beta, signs, -1, dtype))

    def written(self) -> Recipe:
        """The recipe."""
        what = self.what
        inputs = tuple(self.number(e) for e in what.inputs)
        self.write_all(self.sums())
        outputs = tuple((e, self.operand(e, False)) for e in what.wanted)
        done = {op.out for op in self.out}
        direct = {o.value for _, o in outputs if not o.turned}
        found, registers = registered(self.out, direct & done, {o.value for _, o in outputs})
        values = self.numbered()
        given = {*done, *inputs}
        older = tuple((values[n], n) for n in sorted(self.numbers.values()) if n not in given)
        size = {n: elements(self.known(e) or ()) for n, e in values.items()}
        moved = sum(size.get(n, 0) for op in found for n in (op.out, *(o.value for o in op.args)))
        return Recipe(tuple(found), inputs, older, outputs, registers, self.counted(), moved)

    def numbered(self) -> dict[int, Expr]:
        """The value of every number that is not one of the inputs alone."""
        nodes = (*self.what.nodes, *self.what.reductions)
        by_id = {id(e): e for n in nodes for e in (n, *n.args)} | {id(e): e for e in self.what.wanted}
        return {n: by_id[i] for i, n in self.numbers.items() if i in by_id}

    def sums(self) -> dict[int, _Sum]:
        """The nodes that are one product with what is added to it, by id; from the last on, so that a sum of
        several terms takes the product of its last one.
        """
        found: dict[int, _Sum] = {}
        for e in reversed(self.what.nodes):
            whole = None if id(e) in self.inside or self.base(e)[0] is not e else self.sum_of(e)
            if whole is not None:
                found[id(e)] = whole
                self.inside |= self.swallowed(e, whole.value)
        return found

    def write_all(self, sums: dict[int, _Sum]) -> None:
        """Every node that is an operation, then the reductions."""
        for e in self.what.nodes:
            if self.base(e)[0] is e and id(e) not in self.inside and e.op not in ("const", "input"):
                self.write_node(e, sums.get(id(e)))
        for r in self.what.reductions:
            self.write("reduce", r, (self.operand(r.args[0], False),))

    def write_node(self, e: Expr, found: "_Sum | None") -> None:
        flip = self.flip[id(e)]
        if found is not None:
            a, b = self.factors_of(found.value, found.turned != flip)
            c = self.operand(found.other, found.other_turned != flip)
            dtype = dict(found.value.options).get("dtype")
            self.write("product", e, (a, b, c), found.factors, found.other_factors, found.signs, dtype)
        elif e.op == "matmul" and self.known(e) is not None:
            self.write("product", e, self.factors_of(e, flip), dtype=dict(e.options).get("dtype"))
        else:
            self.write("apply", e, tuple(self.operand(a, flip) for a in e.args))

    def counted(self) -> int:
        flops = 0
        for e in self.what.nodes:
            a, out = self.known(e.args[0]) if e.args else None, self.known(e)
            if e.op == "matmul" and a is not None and out is not None:
                n = 1
                for d in out:
                    n *= d
                flops += 2 * n * a[-1]
        return flops


def _scaled(e: Expr) -> bool:
    """Whether a node is another times a number."""
    return e.op == "multiply" and sum(a.domain == "scalar" for a in e.args) == 1


def _turned(shape: Shape | None, turned: bool) -> Shape | None:
    return exchanged(shape) or shape if turned and shape is not None else shape


VIEWS = frozenset({"reshape", "transpose", "diagonal", "item"})
"""Operations that may give what they take, seen in another way."""


def registered(code: Sequence[Operation], direct: set[int], outputs: set[int]) -> tuple[list[Operation], int]:
    """The operations with a buffer for every value but those that lie in one of their own, which are
    `direct`. A buffer is used again after its last read, unless it holds an output.
    """
    owner = _owners(code)
    read = [{owner.get(o.value, o.value) for o in op.args} for op in code]
    last = {v: i for i, values in enumerate(read) for v in values}
    last |= dict.fromkeys((owner.get(v, v) for v in outputs), len(code))
    buffers, at = _Buffers(), dict[int, int]()
    found: list[Operation] = []
    for i, op in enumerate(code):
        register, spare = -1, -1
        if op.kind != "reduce" and op.out not in direct and op.out not in owner:
            register = at[op.out] = buffers.taken()
        if op.kind == "product" and len(op.args) == 3:
            spare = buffers.taken()
            buffers.idle.append(spare)
        found.append(dataclasses.replace(op, register=register, spare=spare))
        buffers.idle += [at[v] for v in read[i] if v in at and last[v] == i]
    return found, buffers.count


def _owners(code: Sequence[Operation]) -> dict[int, int]:
    """Value that sees another one -> the value in whose buffer it lies."""
    found: dict[int, int] = {}
    for op in code:
        if op.node.op in VIEWS and op.kind == "apply":
            found[op.out] = found.get(op.args[0].value, op.args[0].value)
    return found


class _Buffers:
    """Numbers of buffers, some of them idle."""

    def __init__(self) -> None:
        self.idle: list[int] = []
        self.count = 0

    def taken(self) -> int:
        """An idle one, or a new one."""
        if self.idle:
            return self.idle.pop()
        self.count += 1
        return self.count - 1
