"""What a module offers, as Markdown, read from its text: signatures, and the comments behind
arguments."""

import ast
import html
import io
import re
import textwrap
import tokenize
from pathlib import Path

import house

WIDTH = 100  # of a signature, columns


def escaped(text):
    "A comment in which Markdown finds nothing to do, but for code in backticks."
    parts = re.split(r'(`[^`\n]+`)', text)
    plain = [re.sub(r'([*_\[\]|\\#])', r'\\\1', html.escape(t, quote=False)) for t in parts[::2]]
    parts[::2] = plain
    return ''.join(parts)


def code(text):
    return '`` ' + text.replace('|', r'\|') + ' ``'


def fenced(text):
    return f'````` python\n{text}\n`````'


def table(rows, head):
    "Two columns; nothing where the second says nothing."
    if not any(words for _, words in rows):
        return ''
    return '\n'.join([f'| {head} | |', '|---|---|', *(f'| {a} | {b} |' for a, b in rows)])


def help_of(default):
    "The words of a command's option: typer.Option(..., help='...')."
    keywords = getattr(default, 'keywords', [])
    return [
        escaped(k.value.value)
        for k in keywords
        if k.arg == 'help' and isinstance(k.value, ast.Constant)
    ]


def defaults_of(arguments):
    "Argument -> its default."
    positional = [*arguments.posonlyargs, *arguments.args]
    given = dict(zip(positional[::-1], arguments.defaults[::-1]))
    return given | dict(zip(arguments.kwonlyargs, arguments.kw_defaults))


def has_mark(function, mark):
    return any(ast.unparse(d) == mark for d in function.decorator_list)


class Module:
    "What a module offers."

    def __init__(
        self,
        path,  # of its file
        package=house.PACKAGE,
    ):
        text = path.read_text(encoding='utf-8')
        inside = path.relative_to(package) if path.is_relative_to(package) else Path(path.name)
        self.name = '.'.join(inside.with_suffix('').parts)
        self.tree = ast.parse(text)
        self.lines = text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [t for t in tokens if t.type == tokenize.COMMENT]
        self.comments = {t.start[0]: escaped(t.string.lstrip('#-> ').rstrip()) for t in comments}
        found = re.search(r'^# %% (?:\.\./)+nbs/(\S+)', text, re.M)
        self.page = house.NBS / found[1] if found else None
        body = self.tree.body
        kinds = (ast.FunctionDef, ast.ClassDef)
        self.defs = {node.name: node for node in body if isinstance(node, kinds)}
        assigned = [n for n in body if isinstance(n, ast.Assign)]
        self.values = {n.targets[0].id: n for n in assigned if isinstance(n.targets[0], ast.Name)}
        listed = self.values.get('__all__')
        self.names = ast.literal_eval(listed.value) if listed else []
        self.patches = [node for node in self.defs.values() if has_mark(node, 'patch')]

    def stands_alone(self, line):
        "Whether a comment has its line for itself: then it speaks of what comes after it."
        return self.lines[line - 1].lstrip().startswith('#')

    def argument_rows(self, arguments, skip):
        "Arguments by the line on which they end: (their code, their words)."
        defaults, rows = defaults_of(arguments), {}
        stars = {arguments.vararg: '*', arguments.kwarg: '**'}
        positional = [*arguments.posonlyargs, *arguments.args][skip:]
        every = [*positional, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        for argument in filter(None, every):
            default = defaults.get(argument)
            words = help_of(default)
            text = stars.get(argument, '') + argument.arg
            text += f':{ast.unparse(argument.annotation)}' if argument.annotation else ''
            text += f'={ast.unparse(default)}' if default and not words else ''
            line = argument if words else (default or argument).end_lineno
            signature, said = rows.setdefault(line, ([], []))
            signature.append(code(text))
            said += words
        return rows

    def parameters(
        self,
        function,
        skip,  # arguments at the beginning to leave out: self
    ):
        "A row for each line of arguments, for which its comment speaks, and one for the result."
        rows, returned = self.argument_rows(function.args, skip), []
        ends = [line for line in rows if isinstance(line, int)]
        result, body = function.returns, function.body[0].lineno
        last = max([function.lineno, *ends])
        stop = max(body, result.end_lineno + 1 if result else 0)
        for line in range(function.lineno, stop):
            if line not in self.comments or line == body:
                continue
            after = [end for end in ends if end > line]
            if self.stands_alone(line) and after:
                rows[min(after)][1].append(self.comments[line])
                continue
            before = [end for end in ends if end <= line]
            of_result = line > last or (result and line >= result.end_lineno) or not before
            words = returned if of_result else rows[max(before)][1]
            words.append(self.comments[line])
        shown = [(', '.join(names), ' '.join(words)) for names, words in rows.values()]
        if result or returned:
            kind = code(ast.unparse(result)) if result else ''
            shown.append((f'*returns* {kind}', ' '.join(returned)))
        return table(shown, 'parameter')

    def words(self, node):
        "A docstring; or the comment behind a definition of one line."
        if words := ast.get_docstring(node):
            return escaped(words)
        return self.comments.get(node.lineno, '') if node.body[0].lineno == node.lineno else ''

    def function(self, function, owner=''):
        "Heading, signature, words and parameters."
        name = f'{owner}.{function.name}' if owner else function.name
        is_method = bool(owner) and not has_mark(function, 'staticmethod')
        rows = self.parameters(function, is_method)
        level = '###' if owner else '##'
        heading = f'{level} {escaped(name)} {{ #{name} }}'
        return [heading, fenced(signature(function)), self.words(function), rows]

    def methods(self, owner):
        "Of the class body, and those that pages added later."
        own = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
        added = [p for p in self.patches if patched_class(p) == owner.name]
        return own + added

    def cls(self, owner):
        methods = self.methods(owner)
        kinds = (ast.AnnAssign, ast.Assign)
        fields = [
            (code(ast.unparse(node)), self.comments.get(node.end_lineno, ''))
            for node in owner.body
            if isinstance(node, kinds)
        ]
        bases = ', '.join(map(ast.unparse, owner.bases))
        head = f'class {owner.name}' + (f'({bases})' if bases else '')
        return [
            f'## {escaped(owner.name)} {{ #{owner.name} }}',
            fenced(head),
            self.words(owner),
            *(self.parameters(m, 1) for m in methods if m.name == '__init__'),
            table(fields, 'field'),
            *(p for m in methods if m.name[0] != '_' for p in self.function(m, owner.name)),
        ]

    def constants(self):
        rows = []
        for name, node in self.values.items():
            if name in self.names:
                value = textwrap.shorten(ast.unparse(node.value), 80, placeholder=' …')
                words = self.comments.get(node.end_lineno, '')
                rows.append((code(name), f'{code(value)} {words}'))
        return ['## Constants', table(rows, 'name')] if rows else []

    def markdown(
        self,
        titles,  # page -> its title
    ):
        parts = [f'# spatialavatar0.{escaped(self.name)}']
        parts.append(escaped(ast.get_docstring(self.tree) or ''))
        if self.page in titles:
            path = self.page.relative_to(house.NBS).with_suffix('.md').as_posix()
            title = titles[self.page]
            parts.append(f'Made, and explained, by page [{title}](../{path}).')
        for node in [self.defs[name] for name in self.names if name in self.defs]:
            parts += self.cls(node) if isinstance(node, ast.ClassDef) else self.function(node)
        return '\n\n'.join(filter(None, [*parts, *self.constants()]))


def patched_class(function):
    "Name of the class that a patch belongs to."
    first = function.args.args[0].annotation
    return ast.unparse(first) if first else ''


def signature(function):
    "A definition's first line, wrapped; options of commands show their default only."
    defaults = [
        (d.args or [ast.Constant(...)])[0] if help_of(d) else d for d in function.args.defaults
    ]
    function.args.defaults = defaults
    text = function.name
    text += '' if has_mark(function, 'property') else f'({ast.unparse(function.args)})'
    text += f' -> {ast.unparse(function.returns)}' if function.returns else ''
    wrapped = textwrap.wrap(
        text, WIDTH, subsequent_indent=' ' * 4, break_long_words=False, break_on_hyphens=False
    )
    return '\n'.join(wrapped)
