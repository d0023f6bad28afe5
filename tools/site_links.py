"""What is wrong with the links of a built site: anchors that lead nowhere, things fetched from
elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = 'src', 'poster', 'data', 'xlink:href'
ONLY_NAMED = 'canonical', 'alternate', 'license', 'prev', 'next'  # links a browser does not load


def remote_in_css(text):
    "Addresses on other machines that a style asks for."
    return re.findall(r'(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')\s]+)', text)


def loaded_by(tag, given):
    "What a browser loads for a tag."
    urls = [given[k] for k in LOADED if k in given and tag != 'a']
    urls += [part.split()[0] for part in given.get('srcset', '').split(',') if part.strip()]
    is_style = tag == 'link' and given.get('rel') not in ONLY_NAMED
    if is_style or tag in ('use', 'image'):
        urls.append(given.get('href', ''))
    return urls


class Links(HTMLParser):
    "Anchors of a page, and everything it refers to."

    def __init__(self, text):
        super().__init__()
        self.ids = set()
        self.refs = []  # followed or loaded
        self.loads = []  # loaded
        self.in_style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = {k: v or '' for k, v in attrs}
        self.in_style = tag == 'style'
        self.ids |= {given[k] for k in ('id',) if k in given}
        if tag == 'a' and 'name' in given:
            self.ids.add(given['name'])
        urls = loaded_by(tag, given)
        self.loads += urls + remote_in_css(given.get('style', ''))
        self.refs += urls
        if 'href' in given and tag in ('a', 'area', 'link'):
            self.refs.append(given['href'])

    def handle_data(self, text):
        if self.in_style:
            self.loads += remote_in_css(text)

    def handle_endtag(self, tag):
        self.in_style = False


def wrong_link(url, file, folder, pages):
    "What is wrong with one link of a page; None if it leads somewhere."
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    outside = parts.path.startswith('/') or not target.is_relative_to(folder)
    if outside or not target.is_file():
        return f'no file {url}'
    anchors = pages[target].ids | {'top'} if target in pages else None
    if parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors:
        return f'no anchor {url}'
    return None


def check(folder):
    "What is wrong with a built site, a line each."
    folder = Path(folder).resolve()
    files = sorted(folder.rglob('*.html'))
    pages = {file: Links(file.read_text(encoding='utf-8')) for file in files}
    if not pages:
        return ['no page']
    wrong = []
    for file, page in pages.items():
        place = file.relative_to(folder).as_posix()
        far = [url for url in dict.fromkeys(page.loads) if re.match(r'(https?:)?//', url)]
        said = [wrong_link(url, file, folder, pages) for url in dict.fromkeys(page.refs)]
        wrong += [f'{place}: fetches {url}' for url in far]
        wrong += [f'{place}: {words}' for words in said if words]
    for file in sorted(folder.rglob('*.css')):
        place = file.relative_to(folder).as_posix()
        far = remote_in_css(file.read_text(encoding='utf-8'))
        wrong += [f'{place}: fetches {url}' for url in far]
    return wrong
