/* The stand-in driver's graphs of kernels. Separate because a graph has its own order: here the one
 * that is allowed and furthest from the order of adding, so that a missing dependency is seen. */
#include <stdlib.h>

#include "driver.h"

typedef struct Node {
    Handle handle;
    struct Graph *graph;
    Launch launch;
    size_t index;
} Node;

typedef struct {
    size_t from, to;
} Edge;

typedef struct Graph {
    Node **nodes;
    Edge *edges;
    size_t node_count, node_room, edge_count, edge_room;
} Graph;

struct Executable {
    Launch *launches;
    size_t count;
    unsigned holders;
};

/* The kernel of a node as cuda.h lays it out. */
typedef struct {
    Handle function;
    unsigned grid[3], block[3], shared_bytes;
    void **parameters, **extra;
    Handle kernel, context;
} NodeParameters;

/* Room for one more; 0 if there is none. */
static int grow(void **items, size_t count, size_t *room, size_t size) {
    if (count < *room) {
        return 1;
    }
    size_t more = *room ? *room * 2 : 64;
    void *larger = realloc(*items, more * size);
    if (larger) {
        *items = larger;
        *room = more;
    }
    return larger != NULL;
}

CUresult cuGraphCreate(Handle *result, unsigned flags) {
    CUresult entered = enter(1);
    if (!entered && (!result || flags)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    Graph *graph = entered ? NULL : calloc(1, sizeof *graph);
    if (!entered && !graph) {
        entered = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (!entered) {
        *result = handle_new(GRAPH, graph);
    }
    return leave(entered);
}

static CUresult check_nodes(const Graph *graph, const Handle *handles, size_t count) {
    if (count && !handles) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    for (size_t i = 0; i < count; i++) {
        const Node *node = handle_object(NODE, handles[i]);
        if (!node) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (node->graph != graph) {
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    return CUDA_SUCCESS;
}

/* An edge that is there already is an error, as for the real one. */
static CUresult add_edge(Graph *graph, size_t from, size_t to) {
    for (size_t i = graph->edge_count; i-- > 0 && graph->edges[i].to == to;) {
        if (graph->edges[i].from == from) {
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    if (!grow((void **)&graph->edges, graph->edge_count, &graph->edge_room, sizeof *graph->edges)) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    graph->edges[graph->edge_count++] = (Edge){from, to};
    return CUDA_SUCCESS;
}

static CUresult add_node(Graph *graph, Handle *result, const Handle *before, size_t count,
                         const NodeParameters *asked) {
    Node *node = calloc(1, sizeof *node);
    if (!node || !grow((void **)&graph->nodes, graph->node_count, &graph->node_room,
                       sizeof *graph->nodes)) {
        free(node);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    CUresult problem = launch_new(&node->launch, asked->function, asked->grid, asked->block,
                                  asked->shared_bytes, asked->parameters, asked->extra);
    size_t edges = graph->edge_count;
    node->graph = graph;
    node->index = graph->node_count;
    for (size_t i = 0; !problem && i < count; i++) {
        problem = add_edge(graph, ((Node *)handle_object(NODE, before[i]))->index, node->index);
    }
    if (problem) {
        graph->edge_count = edges;
        free(node->launch.argument);
        free(node);
        return problem;
    }
    graph->nodes[graph->node_count++] = node;
    *result = node->handle = handle_new(NODE, node);
    return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode_v2(Handle *result, Handle handle, const Handle *before, size_t count,
                                 const NodeParameters *asked) {
    CUresult entered = enter(1);
    Graph *graph = handle_object(GRAPH, handle);
    if (!entered && !graph) {
        entered = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!entered && (!result || !asked || asked->kernel)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    if (!entered && asked->context && !handle_object(CONTEXT, asked->context)) {
        entered = CUDA_ERROR_INVALID_CONTEXT;
    }
    entered = entered ? entered : check_nodes(graph, before, count);
    return leave(entered ? entered : add_node(graph, result, before, count, asked));
}

CUresult cuGraphAddDependencies_v2(Handle handle, const Handle *from, const Handle *to,
                                   const void *edge_data, size_t count) {
    CUresult result = enter(1);
    Graph *graph = handle_object(GRAPH, handle);
    if (!result && !graph) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result && edge_data) {
        result = CUDA_ERROR_NOT_SUPPORTED;
    }
    result = result ? result : check_nodes(graph, from, count);
    result = result ? result : check_nodes(graph, to, count);
    for (size_t i = 0; !result && i < count; i++) {
        const Node *first = handle_object(NODE, from[i]), *second = handle_object(NODE, to[i]);
        result = add_edge(graph, first->index, second->index);
    }
    return leave(result);
}

/* What has to be known of a graph to order it; edges are named by their index plus one. */
typedef struct {
    size_t *waits;  /* of each node: how many it still comes after */
    size_t *first;  /* of each node: the first of its edges */
    size_t *second; /* of each edge: the next one of its node */
    size_t *ready;  /* nodes that wait for nothing */
    size_t ready_count;
} Order;

/* Of the nodes that may run, the one that was added last is next. */
static size_t take_ready(Order *order) {
    size_t best = 0;
    for (size_t i = 1; i < order->ready_count; i++) {
        best = order->ready[i] > order->ready[best] ? i : best;
    }
    size_t node = order->ready[best];
    order->ready[best] = order->ready[--order->ready_count];
    return node;
}

/* 0 if some nodes never may run: a cycle. */
static int put_in_order(const Graph *graph, Order *order, Launch *result) {
    size_t done = 0;
    for (size_t i = 0; i < graph->edge_count; i++) {
        Edge edge = graph->edges[i];
        order->waits[edge.to]++;
        order->second[i] = order->first[edge.from];
        order->first[edge.from] = i + 1;
    }
    for (size_t i = 0; i < graph->node_count; i++) {
        if (order->waits[i] == 0) {
            order->ready[order->ready_count++] = i;
        }
    }
    while (order->ready_count) {
        size_t node = take_ready(order);
        result[done++] = graph->nodes[node]->launch;
        for (size_t edge = order->first[node]; edge; edge = order->second[edge - 1]) {
            size_t follower = graph->edges[edge - 1].to;
            if (--order->waits[follower] == 0) {
                order->ready[order->ready_count++] = follower;
            }
        }
    }
    return done == graph->node_count;
}

/* The graph may change or go afterwards: the arguments are copied too. */
static int copy_arguments(Executable *executable, size_t count) {
    for (size_t i = 0; i < count; i++) {
        Launch *launch = &executable->launches[i];
        void *copy = malloc(launch->argument_bytes);
        if (!copy) {
            return 0;
        }
        launch->argument = memcpy(copy, launch->argument, launch->argument_bytes);
        executable->count++;
    }
    return 1;
}

static CUresult instantiate(const Graph *graph, Executable *executable) {
    size_t nodes = graph->node_count;
    size_t *scratch = calloc(nodes * 3 + graph->edge_count + 1, sizeof *scratch);
    executable->launches = calloc(nodes + 1, sizeof *executable->launches);
    CUresult problem = CUDA_ERROR_OUT_OF_MEMORY;
    if (scratch && executable->launches) {
        Order order = {scratch, scratch + nodes, scratch + nodes * 3, scratch + nodes * 2, 0};
        problem = !put_in_order(graph, &order, executable->launches) ? CUDA_ERROR_INVALID_VALUE
                  : !copy_arguments(executable, nodes)               ? CUDA_ERROR_OUT_OF_MEMORY
                                                                     : CUDA_SUCCESS;
    }
    free(scratch);
    return problem;
}

CUresult cuGraphInstantiateWithFlags(Handle *result, Handle handle, unsigned long long flags) {
    CUresult entered = enter(1);
    const Graph *graph = handle_object(GRAPH, handle);
    if (!entered && !graph) {
        entered = CUDA_ERROR_INVALID_HANDLE;
    }
    /* Freeing of its memory at a launch, priorities: a graph of kernels has neither. */
    if (!entered && (!result || (flags & ~(1ull | 8ull)))) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    Executable *executable = entered ? NULL : calloc(1, sizeof *executable);
    if (!executable) {
        return leave(entered ? entered : CUDA_ERROR_OUT_OF_MEMORY);
    }
    executable->holders = 1;
    entered = instantiate(graph, executable);
    if (entered) {
        executable_release(executable);
    } else {
        counts.graphs++;
        *result = handle_new(EXECUTABLE, executable);
    }
    return leave(entered);
}

void executable_run(const Executable *executable) {
    for (size_t i = 0; i < executable->count && !failure(); i++) {
        launch_run(&executable->launches[i]);
    }
}

void executable_release(Executable *executable) {
    if (--executable->holders == 0) {
        for (size_t i = 0; i < executable->count; i++) {
            free(executable->launches[i].argument);
        }
        free(executable->launches);
        free(executable);
    }
}

CUresult cuGraphLaunch(Handle handle, Handle stream_handle) {
    CUresult result = enter(1);
    Executable *executable = handle_object(EXECUTABLE, handle);
    Stream *stream = stream_of(stream_handle);
    if (!result && (!executable || !stream)) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        counts.graph_launches++;
        log_line("graph launch: %zu kernels", executable->count);
        executable->holders++;
        Work work = {.task = RUN_GRAPH, .executable = executable};
        result = stream_add(stream, &work);
    }
    return leave(result);
}

CUresult cuGraphExecDestroy(Handle handle) {
    CUresult result = enter(1);
    Executable *executable = handle_object(EXECUTABLE, handle);
    if (!result && !executable) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        handle_forget(handle);
        executable_release(executable);
    }
    return leave(result);
}

CUresult cuGraphDestroy(Handle handle) {
    CUresult result = enter(1);
    Graph *graph = handle_object(GRAPH, handle);
    if (!result && !graph) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        for (size_t i = 0; i < graph->node_count; i++) {
            handle_forget(graph->nodes[i]->handle);
            free(graph->nodes[i]->launch.argument);
            free(graph->nodes[i]);
        }
        free(graph->nodes);
        free(graph->edges);
        handle_forget(handle);
        free(graph);
    }
    return leave(result);
}
