"""A chapter on the screen: what a reader sees of it, and what a reader does with it."""

from __future__ import annotations

from playwright.sync_api import Locator, Page

SECONDS = 40
_NOTEBOOK = "const notebook = window.jupyterapp.shell.currentWidget.content;"
_KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
_LOADED = """() => { const notebook = window.jupyterapp?.shell.currentWidget?.content;
    return notebook?.model?.cells?.length > 1 && notebook.widgets.length === notebook.model.cells.length; }"""


class Chapter:
    """A notebook that is open in JupyterLab.

    Args:
        page: of a browser. url: of the notebook in JupyterLab.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        page.set_default_timeout(1000 * SECONDS)
        page.goto(url)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(_LOADED)

    def turn_to(self, path: str) -> None:
        """Open another notebook in the same window, without a kernel."""
        self.page.evaluate(
            """async path => { await window.jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook', kernelPreference: {shouldStart: false}}); }""",
            path,
        )
        opened = f"path => {{ const widget = window.jupyterapp.shell.currentWidget; return widget?.context?.path === path && ({_LOADED})(); }}"
        self.page.wait_for_function(opened, arg=path)

    def use(self, theme: str) -> None:
        """Switch to the "light" or the "dark" theme."""
        name = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}[theme]
        self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        self.page.wait_for_function(
            "light => document.body.dataset.jpThemeLight === light", arg=str(theme == "light").lower()
        )

    def select(self, text: str) -> Locator:
        """Make the cell whose source holds a text the active one, on the screen."""
        script = f"""async text => {{ {_NOTEBOOK}
            const at = notebook.widgets.findIndex(cell => cell.model.sharedModel.source.includes(text));
            if (at < 0) return 'no cell';
            notebook.activeCellIndex = at; notebook.mode = 'command';
            notebook.node.focus({{preventScroll: true}});
            for (let tries = 0, stays = 0; tries < 60; tries++) {{  // cells above may still be drawn, and push this one down
                await notebook.scrollToItem(at, 'start');
                notebook.widgets[at].node.scrollIntoView({{block: 'start'}});
                await new Promise(done => setTimeout(done, 50));
                const box = notebook.widgets[at].node.getBoundingClientRect();
                stays = box.height > 0 && box.top >= 0 && box.top < innerHeight - 60 ? stays + 1 : 0;
                if (stays === 3) return '';
            }}
            return 'not on the screen'; }}"""
        problem = self.page.evaluate(script, text)
        assert not problem, f"{text!r}: {problem}"
        active = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell.jp-mod-active")
        active.wait_for()
        return active

    def run(self, *texts: str) -> Locator:
        """Run the cells whose sources hold these texts with Shift+Enter, wait until they are done, and return the last one."""
        self.page.wait_for_function(f"() => {{ {_NOTEBOOK} return {_KERNEL}?.status === 'idle'; }}")
        for text in texts:
            self.select(text)
            before = self.page.evaluate(
                f"() => {{ {_NOTEBOOK} window.ran = notebook.activeCell.model; return window.ran.executionCount; }}"
            )
            self.page.keyboard.press("Shift+Enter")
            self.wait_for_run(before)
        return self.select(texts[-1])

    def wait_for_run(self, before: int | None) -> None:
        """Until the cell that was run last has a number other than the one before, and the kernel has nothing to do."""
        done = f"before => {{ {_NOTEBOOK} return window.ran.executionCount !== null && window.ran.executionCount !== before && {_KERNEL}?.status === 'idle'; }}"
        self.page.wait_for_function(done, arg=before)

    def write(self, text: str, source: str) -> None:
        """Replace the source of the cell that holds a text."""
        self.select(text)
        self.page.evaluate(
            f"source => {{ {_NOTEBOOK} notebook.activeCell.model.sharedModel.setSource(source); }}", source
        )

    def beside(self, text: str) -> list[str]:
        """The texts of the cells in the window once the one that holds `text` is at its top, without that one's own."""
        self.select(text)
        self.page.wait_for_timeout(100)
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell:not(.jp-mod-active)')]
                .filter(cell => { const box = cell.getBoundingClientRect(); return box.bottom > 0 && box.top < innerHeight; })
                .map(cell => cell.innerText)"""
        )


def contrast(element: Locator) -> float:
    """The contrast of an element's text with what lies behind it, from 1 to 21 (WCAG 2, 1.4.3)."""
    return element.evaluate(
        """element => {
            const parse = text => text.match(/[\\d.]+/g).map(Number);
            const light = color => { const [r, g, b] = color.slice(0, 3).map(x => { x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            let behind = element, back = [0, 0, 0, 0];
            while (behind && (back.length > 3 && back[3] === 0)) { back = parse(getComputedStyle(behind).backgroundColor); if (back.length === 3) break; behind = behind.parentElement; }
            if (back.length > 3 && back[3] === 0) back = [255, 255, 255];
            const [a, b] = [light(parse(getComputedStyle(element).color)), light(back)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05); }"""
    )
