"""What four TensorRTs offer of the classes that run an engine, as their own bindings list it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_COMMON: Final[Mapping[str, str]] = {
    "Runtime": """
        DLA_core deserialize_cuda_engine engine_host_code_allowed error_recorder get_plugin_registry
        gpu_allocator load_runtime logger max_threads num_DLA_cores tempfile_control_flags temporary_directory
    """,
    "ICudaEngine": """
        create_engine_inspector create_execution_context create_serialization_config engine_capability
        error_recorder get_tensor_bytes_per_component get_tensor_components_per_element get_tensor_dtype
        get_tensor_format get_tensor_format_desc get_tensor_location get_tensor_mode get_tensor_name
        get_tensor_profile_shape get_tensor_profile_values get_tensor_shape get_tensor_vectorized_dim
        hardware_compatibility_level is_debug_tensor is_shape_inference_io name num_aux_streams num_io_tensors
        num_layers num_optimization_profiles profiling_verbosity refittable serialize serialize_with_config
        streamable_weights_size tactic_sources
    """,
    "IExecutionContext": """
        active_optimization_profile all_binding_shapes_specified debug_sync device_memory engine
        enqueue_emits_profile error_recorder execute_async_v3 execute_v2 get_debug_listener get_debug_state
        get_input_consumed_event get_max_output_size get_output_allocator get_tensor_address get_tensor_shape
        get_tensor_strides infer_shapes name nvtx_verbosity persistent_cache_limit profiler report_to_profiler
        set_all_tensors_debug_state set_aux_streams set_debug_listener set_input_consumed_event
        set_input_shape set_optimization_profile_async set_output_allocator set_tensor_address
        set_tensor_debug_state temporary_allocator update_device_memory_size_for_shapes
    """,
    "IRuntimeConfig": """
        get_execution_context_allocation_strategy set_execution_context_allocation_strategy
    """,
}
_MORE: Final[Mapping[str, Mapping[str, str]]] = {
    "10.0.1": {
        "Runtime": """

        """,
        "ICudaEngine": """
            create_execution_context_without_device_memory device_memory_size
            get_device_memory_size_for_profile has_implicit_batch_dimension
            minimum_weight_streaming_budget weight_streaming_budget
        """,
        "IExecutionContext": """
            all_shape_inputs_specified
        """,
    },
    "10.13.3.9": {
        "Runtime": """

        """,
        "ICudaEngine": """
            create_execution_context_without_device_memory create_runtime_config device_memory_size
            device_memory_size_v2 get_device_memory_size_for_profile get_device_memory_size_for_profile_v2
            get_weight_streaming_automatic_budget has_implicit_batch_dimension
            minimum_weight_streaming_budget weight_streaming_budget weight_streaming_budget_v2
            weight_streaming_scratch_memory_size
        """,
        "IExecutionContext": """
            all_shape_inputs_specified get_runtime_config set_device_memory unfused_tensors_debug_state
        """,
        "IRuntimeConfig": """

        """,
    },
    "11.4.0.106": {
        "Runtime": """
            dla_workspace_allocation_strategy
        """,
        "ICudaEngine": """
            create_runtime_config device_memory_size_v2 get_aliased_input_tensor
            get_device_memory_size_for_profile_v2 get_engine_stat get_weight_streaming_automatic_budget
            weight_streaming_budget_v2 weight_streaming_scratch_memory_size
        """,
        "IExecutionContext": """
            get_runtime_config set_communicator set_device_memory unfused_tensors_debug_state
        """,
        "IRuntimeConfig": """

        """,
    },
    "1.7.1.116": {
        "Runtime": """
            defer_weights_loading dla_workspace_allocation_strategy engine_header_size get_engine_validity
        """,
        "ICudaEngine": """
            create_runtime_config create_weights_manager device_memory_size_v2 get_aliased_input_tensor
            get_device_memory_size_for_profile_v2 get_engine_stat get_weight_streaming_automatic_budget
            load_weights load_weights_async unload_weights weight_streaming_budget_v2
            weight_streaming_scratch_memory_size weights_loaded
        """,
        "IExecutionContext": """
            get_runtime_config is_stream_capturable set_communicator set_device_memory
            unfused_tensors_debug_state
        """,
        "IRuntimeConfig": """
            create_runtime_cache cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy
            get_runtime_cache set_runtime_cache
        """,
    },
}
VERSIONS: Final = tuple(_MORE)
"""TensorRT 10.0, 10.13 and 11.4, and TensorRT-RTX 1.7."""


def surface(version: str, kind: str) -> frozenset[str]:
    """The names that ``kind`` has in that version; none where the version has no such class."""
    if kind not in _MORE[version]:
        return frozenset()
    return frozenset(f"{_COMMON[kind]} {_MORE[version][kind]}".split())
