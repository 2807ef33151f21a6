"""Hostile templates: no way into Python, no unbounded time or memory."""

import resource
from collections.abc import Iterator

import pytest

from tandem.client.chat import ChatTemplate
from tandem.client.metering import Budget
from tandem.protocol.errors import InvalidRequest, TandemError

USER = [{"role": "user", "content": "x" * 1_000}]
DOUBLING = "{% set ns = namespace(x=messages[0].content) %}{% for i in range(60) %}BODY{% endfor %}{{ ns.x|length }}"
GROWING = {
    "concatenation": DOUBLING.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    "addition": DOUBLING.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
    "block": DOUBLING.replace("BODY", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "replace_filter": DOUBLING.replace("BODY", "{% set ns.x = ns.x|replace('x', ns.x) %}"),
    "replace_method": DOUBLING.replace("BODY", "{% set ns.x = ns.x.replace('', ns.x) %}"),
    "join_filter": DOUBLING.replace("BODY", "{% set ns.x = ns.x|join(ns.x) %}"),
    "join_method": DOUBLING.replace("BODY", "{% set ns.x = ns.x.join(ns.x) %}"),
    "lists": DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}").replace("ns.x|length", "ns.x"),
    "lists_as_json": DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}").replace("ns.x|length", "ns.x|tojson"),
    "lists_as_text": DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}").replace("ns.x|length", "ns.x|string"),
    "lists_formatted": DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}").replace(
        "ns.x|length", "'%s' % (ns.x,)"
    ),
    "list_addition": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("BODY", "{% set ns.x = m(ns.x) %}"),
    "join_of_a_generator": "{{ (range(100000)|map('string')|join('x' * 8000000))|length }}",
    "join_method_of_a_generator": "{{ (('x' * 8000000).join(range(100000)|map('string')))|length }}",
    "default_of_a_generator": "{{ range(100000)|map(attribute='a', default='x' * 8000000)|join|length }}",
    "many_slices": "{% set x = 'x' * 8000000 %}{% set y = [" + "x[1:]," * 200 + "] %}",
    "many_lists": "{% set x = 'x' * 1000000 %}{% set y = [" + "x|list," * 200 + "] %}",
    "many_copies": "{% set x = 'x' * 8000000 %}{% set y = [" + "x.upper()," * 200 + "] %}",
    "many_products": "{% set y = [" + "'x' * 8000000," * 200 + "] %}",
    "multiplication": "{{ 'x' * 10000000000 }}",
    "reverse_multiplication": "{{ (10000000000 * 'x')|length }}",
    "list_multiplication": "{{ ([0] * 10000000000)|length }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent_star": "{{ '%*d' % (10000000000, 1) }}",
    "format_filter": "{{ '%10000000000d'|format(1) }}",
    "format_method": "{{ '{:10000000000}'.format(1) }}",
    "format_nested": "{{ '{:{}}'.format(1, 10000000000) }}",
    "center": "{{ 'x'|center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "indent": "{{ ('\n' * 100000)|indent(100000) }}",
    "json_indent": "{{ [[1]]|tojson(indent=100000000) }}",
    "batch": "{{ [1]|batch(10000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(10000000000)|list }}",
    "round": "{{ 1.5|round(10000000000, 'ceil') }}",
    "map_center": "{{ ['x']|map('center', 10000000000)|list }}",
    "range": "{{ range(10000000000)|list }}",
    "sum": "{{ range(100000)|map('string')|sum(start='') }}",
    "to_bytes": "{{ (1).to_bytes(10000000000) }}",
    "strftime": "{{ strftime_now('%10000000000Y') }}",
    "lipsum": "{{ lipsum(100000) }}",
    "output": "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive_loop": "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "nested_parentheses": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "nested_blocks": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "long_source": "x" * 2_000_000,
}
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ dict.__class__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns._private = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
]


@pytest.fixture
def small_memory() -> Iterator[None]:
    """Fails if the test raised the process's highest memory use ever by over 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("name", GROWING)
def test_growth_is_refused(name: str) -> None:
    with pytest.raises(TandemError):
        ChatTemplate(GROWING[name], {}).render(USER, budget=Budget(turns=200_000))


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_work_is_refused(name: str) -> None:
    with pytest.raises(TandemError):
        ChatTemplate(ENDLESS[name], {}).render(USER, budget=Budget(turns=20_000))


def test_the_deadline_ends_a_slow_template() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(InvalidRequest, match="longer than 0 s"):
        template.render(USER, budget=Budget(seconds=0.0))


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source: str) -> None:
    try:
        text = ChatTemplate(source, {}).render(USER)
    except TandemError:
        return
    assert text == ""  # what is unsafe is undefined


def test_renderings_do_not_share_a_budget() -> None:
    template = ChatTemplate("{% for i in range(900) %}x{% endfor %}", {})
    for _ in range(3):
        assert len(template.render(USER, budget=Budget(turns=1_000))) == 900
