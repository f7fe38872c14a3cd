"""The page behind `rlt app`: drop a video on it, move a threshold, and see what would be saved.

`looking` and `words` need no web server: from a clip and a rule to numbers, pictures and sentences. `page` lays them
out with Gradio and serves them on this machine.

from rlt.app import AppSettings, serve
serve(AppSettings())  # until Ctrl-C
"""

from rlt.app.looking import AppSettings
from rlt.app.page import build, serve

__all__ = ["AppSettings", "build", "serve"]
