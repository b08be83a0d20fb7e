# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint is worth: perplexity, bits per byte, and text that it generates."""
