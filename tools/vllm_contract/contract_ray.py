"""Every part of Ray that this package uses beyond what Ray calls stable, and where. Read from its sources, as vLLM's are.

Ray's request routers and replica contexts are public, and may change with every version. The late-bound ASGI application is
named in the documentation of `serve.ingress` only.
"""

from vllm_contract.symbols import calls, exports, implements, overrides, reads, says

VERSION = "2.60.0"
"""Of Ray, as the extra `cluster` pins it."""
ROUTER, SERVER, APPLICATION = "cluster/router.py", "cluster/server.py", "cluster/application.py"
ACTOR, COMMAND = "cluster/actor.py", "cluster/command.py"
ROUTERS = "ray.serve.request_router"

RAY_CONTRACT = (
    *exports(ROUTERS, ROUTER, "PendingRequest RequestRouter RunningReplica"),
    *implements(f"{ROUTERS}:RequestRouter", ROUTER, "choose_replicas"),
    *overrides(f"{ROUTERS}:RequestRouter", ROUTER, choose_replicas="candidate_replicas pending_request"),
    *calls(f"{ROUTERS}:RequestRouter", ROUTER, initialize_state="settings= app="),
    *reads(f"{ROUTERS}:PendingRequest", ROUTER, "args metadata"),
    *reads("ray.serve._private.common:RequestMetadata", ROUTER, "internal_request_id"),
    *reads(f"{ROUTERS}:RunningReplica", ROUTER, "replica_id routing_stats"),
    *reads(f"{ROUTERS}:ReplicaID", ROUTER, "unique_id"),
    # The name that a replica knows itself by is the one that routers see.
    *reads("ray.serve.context:ReplicaContext", f"{SERVER} {APPLICATION}", "app_name"),
    *reads("ray.serve.context:ReplicaContext", SERVER, "replica_tag rank"),
    *says("ray.serve.context:ReplicaContext.replica_tag", SERVER, "return self.replica_id.unique_id"),
    *reads("ray.serve.schema:ReplicaRank", SERVER, "local_rank"),
    *exports("ray.serve", f"{SERVER} {APPLICATION}", "get_replica_context"),
    *exports("ray.serve", COMMAND, "delete run shutdown start"),
    *calls(
        "ray.serve",
        APPLICATION,
        deployment="_func_or_class name= num_replicas= max_ongoing_requests= max_constructor_retry_count= "
        "health_check_period_s= health_check_timeout_s= graceful_shutdown_timeout_s= ray_actor_options= "
        "request_router_config=",
        ingress="",
    ),
    *says("ray.serve.api:ingress", APPLICATION, "__serve_build_asgi_app__"),
    *exports("ray.serve.config", APPLICATION, "RequestRouterConfig"),
    *reads(
        "ray.serve.config:RequestRouterConfig",
        APPLICATION,
        "request_router_class request_router_kwargs request_routing_stats_period_s",
    ),
    *exports("ray.serve.handle", f"{APPLICATION} {SERVER}", "DeploymentHandle"),
    *calls("ray.serve.handle:DeploymentHandle", f"{APPLICATION} {SERVER}", options="method_name= stream="),
    *calls("ray.serve.handle:DeploymentHandle", APPLICATION, choose_replica=""),
    *reads(
        "ray.serve._private.request_router.replica_wrapper:ReplicaSelection",
        APPLICATION,
        "replica_id node_id replica_metadata",
    ),
    # Only the choice: no slot is reserved at the replica, which would take a call to its process.
    *says(
        "ray.serve._private.router:AsyncioRouter.choose_replica", APPLICATION, "request_kwargs.pop('_reserve', True)"
    ),
    *says(
        "ray.serve._private.replica:UserCallableWrapper._call_user_record_replica_metadata",
        SERVER,
        "self._call_func_or_gen(self._user_record_replica_metadata)",
    ),
    *calls("ray.serve.handle:DeploymentResponse", SERVER, cancel=""),
    *calls("ray.serve.handle:DeploymentResponseGenerator", APPLICATION, cancel=""),
    *exports("ray.serve._private.constants", COMMAND, "SERVE_SESSION_ID"),
    *exports("ray", COMMAND, "init shutdown"),
    *exports("ray", APPLICATION, "cluster_resources get_runtime_context is_initialized"),
    *calls("ray.runtime_context:RuntimeContext", APPLICATION, get_node_id=""),
    *exports("ray.util", SERVER, "get_node_ip_address"),
    *exports("ray", ACTOR, "get get_actor remote"),
)
