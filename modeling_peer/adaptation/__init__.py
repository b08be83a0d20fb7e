# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Adaptation makes another checkpoint of a trained one."""
