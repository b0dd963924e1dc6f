"""Hooks of mkdocs: links that leave docs/, and the live explorer of two models trained while the site is built."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "site"  # ignored by git; the trained models of an earlier build
JOINS = ("basic", "LaPE")
EPOCHS = 10


def on_page_markdown(markdown, config, **_):
    """`../SECURITY.md` leads to a file on GitHub: here to the repository, or nowhere where that has no address."""
    where = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", where, markdown)


def on_files(files, config):
    files.append(File.generated(config, "live/explorer.html", content=_explorer().read_text(encoding="utf-8")))
    return files


def _explorer():
    page = CACHE / "explorer.html"
    if not page.exists():
        import lape
        from lape.recipe import Recipe
        from lape.train.loop import train

        CACHE.mkdir(parents=True, exist_ok=True)
        for join in JOINS:
            train(Recipe.from_yaml("digits", join_type=join, epochs=EPOCHS, output_dir=str(CACHE / join), device="cpu"))
        lape.explore([CACHE / join / "checkpoint.pth" for join in JOINS], page)
    return page
