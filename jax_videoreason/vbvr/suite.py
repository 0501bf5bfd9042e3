"""The tasks of VBVR-Bench: which split and which faculty each belongs to; the same for our own.

Source: TASK_CATEGORY_MAP of Video-Reason/VBVR-EvalKit (commit 275472f).
"""

IN_DOMAIN, OUT_OF_DOMAIN = "In-Domain_50", "Out-of-Domain_50"
SPLITS = {IN_DOMAIN: "in-domain", OUT_OF_DOMAIN: "out-of-domain"}
FACULTIES = ("Abstraction", "Knowledge", "Perception", "Spatiality", "Transformation")
SAMPLES = 5  # of each task
SUFFIX = "_data-generator"

_NAMES = {
  IN_DOMAIN: {
    "Abstraction": (
      "G-29_chart_extreme_with_data G-41_grid_highest_cost G-51_predict_next_color "
      "G-131_select_next_figure_increasing_size_sequence "
      "G-134_select_next_figure_large_small_alternating_sequence O-10_shape_outline_fill "
      "O-12_shape_color_then_scale O-13_shape_outline_then_move O-14_shape_scale_then_outline "
      "O-21_construction_blueprint O-29_ballcolor O-30_bookshelf O-37_light_sequence "
      "O-45_sequence_completion O-47_sliding_puzzle"
    ),
    "Knowledge": (
      "O-15_ball_bounces_given_time O-18_glass_refraction O-19_mirror_reflection "
      "O-23_domino_chain_branch_path_prediction O-24_domino_chain_gap_analysis "
      "O-34_dot_to_dot_task O-52_traffic_light O-53_clock O-75_communicating_vessels"
    ),
    "Perception": (
      "G-3_stable_sort G-5_multi_object_placement G-9_identify_objects_in_region "
      "G-39_attention_shift_different G-43_understand_scene_structure "
      "G-138_spot_unique_non_repeated_color G-158_identify_all_hollow_points "
      "O-16_color_addition O-31_ball_eating O-33_counting_object O-38_majority_color"
    ),
    "Spatiality": (
      "G-13_grid_number_sequence G-15_grid_avoid_obstacles G-16_grid_go_through_block "
      "G-18_grid_shortest_path G-31_directed_graph_navigation G-45_key_door_matching "
      "O-25_LEGO_construction_assembly O-55_rotation"
    ),
    "Transformation": (
      "G-8_track_object_movement G-21_multiple_occlusions_vertical "
      "G-25_seperate_object_spinning G-194_construct_concentric_ring O-32_rolling_ball "
      "O-36_grid_shift O-44_rotation_puzzle"
    ),
  },
  OUT_OF_DOMAIN: {
    "Abstraction": (
      "G-135_select_next_figure_small_large_alternating_sequence G-193_draw_next_sized_shape "
      "O-9_shape_scaling O-11_shape_color_then_move O-43_object_subtraction "
      "O-49_symmetry_completion O-54_control_panel O-56_raven"
    ),
    "Knowledge": (
      "G-160_circle_largest_numerical_value G-217_circle_central_dot "
      "G-247_identify_chinese_character G-273_high_density_liquid O-62_gravity_physics"
    ),
    "Perception": (
      "G-54_connecting_color G-136_locate_point_in_overlapping_area "
      "G-147_identify_unique_figure_in_uniform_set G-161_mark_second_largest_shape "
      "G-167_select_longest_polygon_side G-168_identify_nearest_to_square_rectangle "
      "G-169_locate_intersection_of_segments G-174_arrange_circles_by_circumference "
      "G-189_draw_midpoint_perpendicular_line G-202_mark_wave_peaks G-206_identify_pentagons "
      "G-212_find_incorrect_arrow_direction G-218_identify_largest_angle_in_triangle "
      "G-222_mark_tangent_point_of_circles G-223_highlight_horizontal_lines "
      "G-248_mark_asymmetrical_shape G-250_color_triple_intersection_red "
      "O-2_pigment_color_mixing_subtractive O-65_animal_size_sorting"
    ),
    "Spatiality": (
      "G-47_multiple_keys_for_one_door G-140_locate_topmost_unobscured_figure "
      "G-219_select_leftmost_shape G-221_outline_innermost_square O-39_maze"
    ),
    "Transformation": (
      "G-24_separate_objects_no_spin G-240_add_borders_to_unbordered_shapes O-5_symbol_deletion "
      "O-6_2d_geometric_transformation O-22_construction_stack O-27_move_2_object_to_2_target "
      "O-46_shape_sorter O-58_symbol_delete O-59_symbol_insert O-60_symbol_substitute "
      "O-61_symbol_edit O-64_animal_matching O-85_2d_object_rotation"
    ),
  },
}

# Task folder -> (split folder, faculty).
OFFICIAL = {
  name + SUFFIX: (split, faculty)
  for split, of_faculty in _NAMES.items()
  for faculty, names in of_faculty.items()
  for name in names.split()
}

# Our own tasks stand with the faculty of their nearest official relatives.
OWN_FACULTIES = {
  "maze": "Spatiality",
  "tree_reach": "Spatiality",
  "tictactoe": "Abstraction",
  "occlusion": "Transformation",
  "sort_bars": "Perception",
  "rotate": "Transformation",
  "select_largest": "Perception",
  "bounce": "Knowledge",
  "pick": "Perception",
}
NO_FACULTY = "no faculty"  # of a task that a user wrote
OWN_SPLITS = {
  "train": "in-domain",
  "id": "in-domain",
  "ood": "out-of-domain",
  "heldout": "out-of-domain",
}


def official(split: str) -> list[str]:
  """The task folders of a split folder."""
  return [name for name, (own, _) in OFFICIAL.items() if own == split]


def domain(split: str) -> str:
  """in-domain or out-of-domain, of a split folder of the benchmark or a split of our own tasks."""
  return SPLITS.get(split) or OWN_SPLITS[split]


def faculty(task: str) -> str:
  """The faculty of a task, official or our own; those that users write belong to none."""
  return OFFICIAL[task][1] if task in OFFICIAL else OWN_FACULTIES.get(task, NO_FACULTY)
