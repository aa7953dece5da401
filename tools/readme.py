"README.md from nbs/index.ipynb: run the notebook, keep its text and what its cells show, and let links start at the repository's root."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).parent.parent


def run_index(
    root=ROOT,  # folder of a checkout
):              # the executed notebook
    "nbs/index.ipynb with the outputs that the files of this checkout give."
    notebook = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    ExecutePreprocessor(timeout=60, record_timing=False).preprocess(notebook, {'metadata': {'path': root/'nbs'}})
    return notebook


def readme(
    root=ROOT,      # folder of a checkout
    notebook=None,  # the executed index; default: run it
)->str:             # Markdown
    "What README.md should hold."
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(notebook or run_index(root))
    text = re.sub(r'\]\((?!\.\./|/|#|\w+:)', '](nbs/', text).replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    notebook = run_index()
    nbformat.write(notebook, ROOT/'nbs'/'index.ipynb')
    (ROOT/'README.md').write_text(readme(notebook=notebook), encoding='utf-8')
