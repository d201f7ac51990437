"""Fields that make each kind of network small enough for a test."""

SMALL: dict[str, dict[str, int]] = {
    "edsr": {"num_features": 8, "num_blocks": 2},
    "rep_chain": {"num_features": 8, "num_layers": 4},
    "mobile": {"num_features": 8, "num_blocks": 2},
    "shuffle": {"num_features": 8, "num_blocks": 3},
    "multi_scale": {"num_features": 8, "num_blocks": 2},
    "dam": {"num_features": 8, "num_blocks": 2},
    "fsrcnn": {"num_features": 8, "num_shrunk_features": 4, "num_mapping_layers": 2},
    "espcn": {"num_features": 8},
    "srresnet": {"num_features": 8, "num_blocks": 2},
    "rrdbnet": {"num_features": 8, "num_growth": 4, "num_blocks": 1},
    "unet": {"num_features": 4, "num_levels": 2},
    "swin_light": {"num_features": 8, "num_heads": 2, "num_groups": 1, "num_blocks": 2, "window_size": 4},
    "bicubic": {},
}
