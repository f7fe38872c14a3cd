"""A Hugging Face Space: the page of `rlt app`, for anyone who reaches it."""

from rlt.app import AppSettings, serve

serve(AppSettings(any_checkpoint=False, max_seconds=120, max_megabytes=50), host="0.0.0.0", port=7860)
