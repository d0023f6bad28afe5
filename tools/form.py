"""The form of pages, package, tests, tools and benchmarks, as numbers: a thermometer, not a goal.

    python tools/form.py                 the numbers, beside their limits
    python tools/form.py splats/20       what is long on these pages, or in these files
    python tools/form.py --json          the numbers alone

Counted: statements that share a line; tokens a line; lines of a cell, blank ones left out; lines of
a function's body, docstring left out; the share of names of one letter among all names that are
bound. Compiled kernels are left out. `ruff check` and `ruff format --check` see to the rest.
"""

import ast
import io
import json
import re
import sys
import tokenize

import house

# what -> limit; tests/test_form.py holds the numbers to these. The aim for cells was a median of 8
# and a 90th percentile of 18: a function with a line for each argument is longer than that.
LIMITS = dict(
    semicolons=0,
    tokens_p99=35,
    cell_median=10,
    cell_p90=20,
    cell_most=30,
    body_p99=30,
    body_most=40,
    one_letter=0.15,
)
FOLDERS = 'spatialavatar0', 'tests', 'tools', 'benchmarks'
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


def is_import(source):
    "Whether a cell only imports: its length says nothing."
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in parsed(source).body)


def plain(source):
    "Code without the lines that only IPython understands; Jupyter's last semicolon goes, too."
    source = re.sub(r'^\s*[%!](?=[a-z]).*$', 'pass', source, flags=re.M)
    return re.sub(r';\s*(#.*)?$', '', source)


def parsed(source):
    return ast.parse(plain(source))


def tokens_per_line(source):
    "How many tokens each line of code has."
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(plain(source) + '\n').readline):
        if token.type not in LAYOUT and token.type != tokenize.ENDMARKER:
            counts[token.start[0]] = counts.get(token.start[0], 0) + 1
    return list(counts.values())


def semicolons(source):
    "Statements that follow another one on its line."
    found = tokenize.generate_tokens(io.StringIO(plain(source) + '\n').readline)
    return sum(t.type == tokenize.OP and t.string == ';' for t in found)


def is_kernel(function):
    "Whether numba compiles it: its inner loop is laid out as it must run."
    marks = ' '.join(ast.unparse(d) for d in function.decorator_list)
    return bool(re.search(r'kernel|inline|jit|intrinsic', marks))


def body_lines(function):
    "Lines of a function's body without its docstring."
    body = function.body
    first = body[0]
    has_words = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if has_words and len(body) > 1:
        first = body[1]
    return body[-1].end_lineno - first.lineno + 1


def functions(source):
    "Name, lines and whether it is a kernel, of every function in a piece of code."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n for n in ast.walk(parsed(source)) if isinstance(n, kinds)]
    return [(n.name, body_lines(n), is_kernel(n)) for n in found]


def bindings(tree):
    "Names that code outside kernels binds: variables and arguments."
    if isinstance(tree, ast.FunctionDef) and is_kernel(tree):
        return []
    names = []
    if isinstance(tree, ast.Name) and isinstance(tree.ctx, ast.Store):
        names.append(tree.id)
    if isinstance(tree, ast.arg):
        names.append(tree.arg)
    for child in ast.iter_child_nodes(tree):
        names += bindings(child)
    return names


def cells_of(page):
    "Code cells of a page, as text."
    return [house.text(c) for c in house.read(page)['cells'] if c['cell_type'] == 'code']


def files():
    "Python files that are written by hand."
    found = [p for folder in FOLDERS[1:] for p in (house.ROOT / folder).rglob('*.py')]
    return sorted(found)


def modules():
    return sorted(p for p in house.PACKAGE.rglob('*.py') if p.name != '_modidx.py')


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def is_kernel_cell(source):
    "Whether a cell is one compiled loop."
    body = parsed(source).body
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef) and is_kernel(body[0])


def lines(source):
    return sum(bool(line.strip()) for line in source.splitlines())


def measure():
    "The numbers of the whole checkout."
    cells = [c for p in house.notebooks() for c in cells_of(p) if c.strip()]
    texts = [p.read_text(encoding='utf-8') for p in files()]
    made = [p.read_text(encoding='utf-8') for p in modules()]
    tokens = [n for source in cells + texts for n in tokens_per_line(source)]
    lengths = [lines(c) for c in cells if not is_import(c) and not is_kernel_cell(c)]
    bodies = [n for c in cells + texts for _, n, kernel in functions(c) if not kernel]
    names = [n for c in cells + texts for n in bindings(parsed(c))]
    return dict(
        semicolons=sum(map(semicolons, cells + texts + made)),
        tokens_p99=quantile(tokens, 0.99),
        cell_median=quantile(lengths, 0.5),
        cell_p90=quantile(lengths, 0.9),
        cell_most=max(lengths),
        body_p99=quantile(bodies, 0.99),
        body_most=max(bodies),
        one_letter=round(sum(len(n) == 1 for n in names) / len(names), 3),
    )


def long_places(label, source, number=''):
    "What is long in one piece of code, a line each."
    found = []
    if number != '' and lines(source) > LIMITS['cell_most'] and not is_import(source):
        found.append(f'{label}: a cell of {lines(source)} lines')
    for name, length, kernel in functions(source):
        if length > LIMITS['body_most'] and not kernel:
            found.append(f'{label}: {name} has {length} lines')
    many = [n for n in tokens_per_line(source) if n > LIMITS['tokens_p99']]
    if many:
        found.append(f'{label}: {len(many)} lines of up to {max(many)} tokens')
    return found


def report(wanted):
    "What is long on the pages, or in the files, whose names begin so."
    for page in house.notebooks():
        if any(house.name(page).startswith(w) or page.stem.startswith(w) for w in wanted):
            for i, cell in enumerate(house.read(page)['cells']):
                if cell['cell_type'] == 'code' and house.text(cell).strip():
                    place = f'{house.name(page)} cell {i}'
                    print('\n'.join(long_places(place, house.text(cell), i)), end='')
                    print('\n' * bool(long_places(place, house.text(cell), i)), end='')
            names = [n for c in cells_of(page) for n in bindings(parsed(c))]
            share = sum(len(n) == 1 for n in names) / max(len(names), 1)
            print(f'{house.name(page)}: {share:.0%} of {len(names)} names have one letter')
    for path in files():
        place = path.relative_to(house.ROOT).as_posix()
        if any(place.startswith(w) for w in wanted):
            source = path.read_text(encoding='utf-8')
            names = bindings(parsed(source))
            share = sum(len(n) == 1 for n in names) / max(len(names), 1)
            for line in long_places(place, source):
                print(line)
            print(f'{place}: {share:.0%} of {len(names)} names have one letter')


def main():
    given = sys.argv[1:]
    if given == ['--json']:
        return print(json.dumps(measure()))
    if given:
        return report(given)
    for what, value in measure().items():
        print(f'{what:12} {value:8} (limit {LIMITS[what]})')


if __name__ == '__main__':
    main()
