"""Workers that compute prompts and hand their KV over."""
