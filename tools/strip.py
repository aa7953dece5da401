"Removes from the lessons what does not teach: warnings and progress bars (stderr), and widgets, which are dead once they are saved."
import json
import sys
from pathlib import Path

from parts import notebooks

VIEW = 'application/vnd.jupyter.widget-view+json'


def noise(output): return output.get('name') == 'stderr' or VIEW in output.get('data', {})


def strip(path):
    "Clean a notebook in place; a file that is clean already is not touched."
    notebook = json.loads(path.read_text())
    code = [c for c in notebook['cells'] if c['cell_type'] == 'code']
    widgets = notebook['metadata'].pop('widgets', None)
    if not widgets and not any(noise(o) for c in code for o in c['outputs']): return
    for c in code: c['outputs'] = [o for o in c['outputs'] if not noise(o)]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
    for path in sys.argv[1:] or notebooks(): strip(Path(path))
