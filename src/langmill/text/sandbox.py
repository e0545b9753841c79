"""Jinja for templates that strangers wrote: no way out, no endless work, no endless text.

Attributes that lead to Python's insides are refused by Jinja's immutable sandbox. Work is metered: what a
template prints, loops over, calls, joins, compares and multiplies is paid from a budget, so that any
template ends within seconds and in bounded memory. Operations that can grow text by more than a small
factor in one step are looked at before they run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_round, sync_do_sum
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 1 << 25  # units; a character made or printed is one
STEP, NODE = 40, 4  # a loop's step or a call; a value walked over
GROWTH = 1 << 27  # the most characters that one operation may make
LARGEST = 1 << 20  # the largest number that may say how often or how wide
STARTS, ENDS = "generation_starts_here", "generation_ends_here"  # variables of a rendering
MAX_SOURCE = 1 << 17  # several times the longest template in use; compiling takes seconds at most
_PURSE = "the purse"  # not an identifier: a template can neither read nor set it
_EMPTY: dict[str, Any] = {}
_LISTS: tuple[Any, ...] = (list, tuple, range, *map(type, (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items())))
_SIZED: tuple[Any, ...] = (str, dict, *_LISTS)
# Values of these types have no attribute that a template needs, and some that make bytes without end.
_BARE = (int, float, complex, bytes, range)
# Filters that no chat template needs: work that grows with the square of a text, or chance.
_DROPPED = frozenset("wordwrap striptags urlize xmlattr pprint random".split())
# Filters and methods whose result can be as long as the product of what they are given.
_GROWING = frozenset(
    "replace join format format_map center ljust rjust zfill expandtabs translate indent batch slice "
    "truncate * %".split()
)
_FORMATS = frozenset("format format_map %".split())
_COMPARING = frozenset("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in".split())
_OTHERS = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
# Filters that do not look inside the items of a list.
_SHALLOW = frozenset(
    "length count list first last map select selectattr reject rejectattr default d items reverse".split()
)


class Exhausted(TemplateRuntimeError):
    """The template did more than any chat needs."""


class Refused(TemplateError):
    """The template called raise_exception."""


class Purse:
    """What is left of one rendering's budget."""

    def __init__(self, units: int) -> None:
        self.left = units

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise Exhausted("the chat template does not end, or makes a text without end")

    def weigh(self, value: Any, deep: bool = True) -> int:
        """About how many characters a value prints as, paid for. Lists may share parts, so the walk is metered too."""
        if isinstance(value, str):
            self.spend(len(value) // 64)
            return len(value)
        if not isinstance(value, _SIZED):
            return 1
        if not deep or isinstance(value, range):
            self.spend(len(value) if isinstance(value, range) else len(value) // 4)
            return len(value)
        total, waiting = 0, [value]
        while waiting:
            item = waiting.pop()
            size = len(item) if isinstance(item, _SIZED) else 1
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, _LISTS):
                waiting += item
            self.spend(NODE + size // 4)
            total += 1 + size
        return total

    def allow(self, name: str, given: Sequence[Any], deep: bool = True) -> None:
        """Pay for an operation's arguments; stop one whose result would be too long."""
        self.spend(STEP + NODE * len(given))
        sizes = [self.weigh(value, deep) for value in given]
        if name in _GROWING:
            numbers = [abs(value) for value in given if isinstance(value, int)]
            if name in _FORMATS:  # their widths stand in the text or among the arguments
                numbers.append(sum(int(digits[:8]) for digits in re.findall(r"\d+", str(given[0]))))
            star = name in _FORMATS and re.search(r"%[^\sa-z]*\*", str(given[0]))
            largest = sorted([*numbers, *sizes, 1, 1])[-2:]
            if star or max(numbers, default=0) > LARGEST or largest[0] * largest[1] > GROWTH:
                raise Exhausted(f"the chat template makes too long a text with {name}")

    def charge(self, value: Any) -> Any:
        """Pay for what an operation made."""
        many = isinstance(value, list | tuple | dict)
        self.spend(len(value) if isinstance(value, str) else 8 * len(value) if many else 1)
        return value


class _Meter(NodeTransformer):
    """Makes a template's loops, macros, joins and comparisons pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(0), "paid step"), node.test)
        return self.visit_body(node)

    def visit_body(self, node: Any) -> nodes.Node:
        """A round costs what its body holds."""
        size = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(size), "paid step")))
        checked: nodes.Node = node
        return checked

    visit_Macro = visit_CallBlock = visit_body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """Fixed text is printed like a value, so that it is paid each time."""
        self.generic_visit(node)
        node.nodes = [nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n for n in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "paid joining")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Comparing ends where the smaller side does: all but the last are walked. A search may see all of it."""
        self.generic_visit(node)
        node.expr = _filter(node.expr, "paid walk")
        for operand in node.ops:
            shallow = "paid look" if operand is node.ops[-1] else "paid walk"
            operand.expr = _filter(operand.expr, "paid search" if operand.op in ("in", "notin") else shallow)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.name in _COMPARING:
            node.node = _filter(node.node, "paid walk")
            node.args = [_filter(arg, "paid search") for arg in node.args]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return (
            _filter(node, "paid look") if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node
        )


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _Generation(Extension):
    """{% generation %} marks what the model writes: the variables STARTS and ENDS, where given, stand around it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (STARTS, ENDS))
        return nodes.Scope([first, *body, last], lineno=line)


class _Namespace(Namespace):
    """A namespace that keeps no name that Python gives a meaning."""

    def __init__(*args: Any, **names: Any) -> None:
        for name in (*names, *(name for given in args[1:] for name in dict(given))):
            _public(name)
        Namespace.__init__(*args, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may be without end, and is weighed by nobody


def _public(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect (transformers' functions and settings), metered."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_print,
            cache_size=0,
        )
        self.filters |= {"tojson": _tojson, "round": _round, "sum": _sum}
        kept = {name: function for name, function in self.filters.items() if name not in _DROPPED}
        self.filters = {name: _metered(name, function) for name, function in kept.items()}
        self.filters |= {
            "paid step": _step,
            "paid walk": _walk,
            "paid look": _look,
            "paid search": _search,
            "paid joining": _concatenate,
        }
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if other := next(tree.find_all(_OTHERS), None):
            raise TemplateSyntaxError("it asks for another template, and there is none", other.lineno)
        metered: nodes.Template = _Meter().visit(tree)
        metered.set_environment(self)
        return metered

    def literals(self, source: str) -> frozenset[str]:
        """The fixed strings of a template's expressions."""
        constants = super()._parse(source, None, None).find_all(nodes.Const)
        return frozenset(constant.value for constant in constants if isinstance(constant.value, str))

    def call(self, context: Context, obj: Any, /, *args: Any, **names: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped
        owner = getattr(method, "__self__", None)
        name = getattr(method, "__name__", "") if isinstance(owner, str) else ""
        purse, given = _purse(context), [*args, *names.values()]
        purse.weigh(owner, deep=isinstance(owner, list | tuple))
        purse.allow(name, [owner, *given] if name else given, deep=not isinstance(obj, Macro))
        return purse.charge(super().call(context, obj, *args, **names))

    def call_test(
        self,
        name: str,
        value: Any,
        args: Any = None,
        kwargs: Any = None,
        context: Any = None,
        eval_ctx: Any = None,
    ) -> Any:
        """What `select` and its kin run."""
        if context is not None:
            _purse(context).allow("", (value, args))
        return super().call_test(name, value, args, kwargs, context, eval_ctx)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        bare = isinstance(obj, _BARE) or (isinstance(obj, str) and attr in ("encode", "striptags"))
        return not bare and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        purse = _purse(context)
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            bits = (
                left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > 4096:
                raise Exhausted("the chat template computes with numbers without end")
        elif operator in ("*", "%") and any(isinstance(value, str | list | tuple) for value in (left, right)):
            purse.allow(operator, (left, right))
        return purse.charge(super().call_binop(context, operator, left, right))


def _purse(context: Context) -> Purse:
    purse: Purse = context.parent[_PURSE]
    return purse


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays; Jinja's marks of what a filter wants first are kept."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def call(context: Context, *args: Any, **names: Any) -> Any:
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        purse = _purse(context)
        purse.allow(name, [*args, *names.values()], deep=name not in _SHALLOW)
        return purse.charge(function(*((first[wants],) if wants else ()), *args, **names))

    return call


@pass_context
def _print(context: Context, value: Any) -> str:
    purse = _purse(context)
    purse.weigh(value)
    text = value if type(value) is str else str(value)
    purse.spend(1 + len(text))
    return text


@pass_context
def _step(context: Context, size: int) -> bool:
    _purse(context).spend(STEP + size)
    return True


@pass_context
def _walk(context: Context, value: Any) -> Any:
    _purse(context).weigh(value)
    return value


@pass_context
def _look(context: Context, value: Any) -> Any:
    _purse(context).weigh(value, deep=False)
    return value


@pass_context
def _search(context: Context, value: Any) -> Any:
    """Like `_walk`, but a mapping is asked by its hash."""
    _purse(context).weigh(value, deep=not isinstance(value, dict))
    return value


@pass_context
def _concatenate(context: Context, values: list[Any]) -> str:
    return "".join(_print(context, value) for value in values)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (isinstance(indent, int) and indent > 64) or (isinstance(indent, str) and len(indent) > 64):
        raise Exhausted(f"the chat template indents JSON by {indent}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    """Jinja's, which computes 10 ** precision."""
    if abs(precision) > 64:
        raise Exhausted(f"the chat template rounds to {precision} digits")
    return do_round(value, precision, method)  # type: ignore[arg-type]  # any other method is refused there


@pass_environment
def _sum(
    environment: Sandbox, values: Iterable[Any], attribute: str | int | None = None, start: float = 0
) -> Any:
    """Jinja's, for numbers: to add lists up takes the square of their number."""
    if not isinstance(start, int | float):
        raise Exhausted(f"the chat template adds up {type(start).__name__}s")
    return sync_do_sum(environment, values, attribute, start)


def _dict(*args: Any, **names: Any) -> dict[Any, Any]:
    """Like dict, without the attributes of a class."""
    return dict(*args, **names)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: object) -> None:
    raise Refused(str(message))


def pieces(template: Template, variables: dict[str, Any], budget: int = BUDGET) -> Iterator[str]:
    """Render in pieces; raises `Exhausted`, `Refused` or what Jinja and the template's own mistakes raise."""
    return template.generate({**variables, _PURSE: Purse(budget)})
