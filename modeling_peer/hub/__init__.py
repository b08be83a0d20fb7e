# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models and tokenizers by preset, folder or Hub id, and their model card."""
