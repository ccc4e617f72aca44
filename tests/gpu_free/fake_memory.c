// The memory, streams, graphs and events of fake_driver.c. Device memory is the host's, work is done when it is enqueued,
// and an event has the number of copies so far as its milliseconds. What a capture records is done when its graph is
// launched. fake_alive says how much of it was not given back.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, MOST_WORK = 256 };

typedef struct {
    void* target;
    const void* source;  // NULL: zeros
    size_t bytes;
} Copy;

typedef struct Graph {
    Copy work[MOST_WORK];
    int count;
} Graph;

typedef struct {
    Graph* recording;  // NULL: what is enqueued is done
} Stream;

typedef struct {
    float at_ms;
} Event;

static const size_t TOTAL = (size_t)1 << 31;
static size_t taken;
static int alive;
static float clock_ms;

int fake_alive(void) { return alive; }

static void* take(size_t bytes) {
    ++alive;
    return calloc(1, bytes);
}
static int give(void* taken_before) {
    if (!taken_before) return INVALID_VALUE;
    --alive;
    free(taken_before);
    return SUCCESS;
}

// Every block has its size before it, so that what is free can be told.
enum { HEAD = 256 };
static int take_block(void** address, size_t bytes) {
    if (bytes > TOTAL - taken) return OUT_OF_MEMORY;
    char* block = aligned_alloc(HEAD, HEAD + (bytes + HEAD - 1) / HEAD * HEAD);
    memset(block + HEAD, 0xCD, bytes);
    *(size_t*)block = bytes;
    taken += bytes;
    ++alive;
    *address = block + HEAD;
    return SUCCESS;
}
static int give_block(void* address) {
    if (!address) return INVALID_VALUE;
    taken -= *(size_t*)((char*)address - HEAD);
    return give((char*)address - HEAD);
}
int cuMemGetInfo_v2(size_t* available, size_t* total) { *total = TOTAL; *available = TOTAL - taken; return SUCCESS; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) { return take_block((void**)address, bytes); }
int cuMemFree_v2(uint64_t address) { return give_block((void*)address); }
int cuMemAllocHost_v2(void** address, size_t bytes) { return take_block(address, bytes); }
int cuMemFreeHost(void* address) { return give_block(address); }

static void copy(const Copy* work) {
    if (work->source) memcpy(work->target, work->source, work->bytes);
    else memset(work->target, 0, work->bytes);
    clock_ms += 1;
}
static int enqueue(Stream* stream, Copy work) {
    Graph* graph = stream ? stream->recording : NULL;
    if (!graph) copy(&work);
    else if (graph->count == MOST_WORK) return OUT_OF_MEMORY;
    else graph->work[graph->count++] = work;
    return SUCCESS;
}
int cuMemsetD8Async(uint64_t target, unsigned char value, size_t bytes, Stream* stream) {
    return value ? INVALID_VALUE : enqueue(stream, (Copy){(void*)target, NULL, bytes});
}
int cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t bytes, Stream* stream) {
    return enqueue(stream, (Copy){(void*)target, source, bytes});
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, Stream* stream) {
    return enqueue(stream, (Copy){target, (const void*)source, bytes});
}
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t bytes, Stream* stream) {
    return enqueue(stream, (Copy){(void*)target, (const void*)source, bytes});
}
int cuMemcpyHtoD_v2(uint64_t target, const void* source, size_t bytes) {
    return enqueue(NULL, (Copy){(void*)target, source, bytes});
}
int cuMemcpyDtoH_v2(void* target, uint64_t source, size_t bytes) {
    return enqueue(NULL, (Copy){target, (const void*)source, bytes});
}

int cuStreamCreate(Stream** stream, unsigned flags) { *stream = take(sizeof **stream); return SUCCESS; }
int cuStreamDestroy_v2(Stream* stream) { return give(stream); }
int cuStreamSynchronize(Stream* stream) { return stream && stream->recording ? 900 : SUCCESS; }  // 900: it is captured

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (!stream || stream->recording || mode != 1) return INVALID_VALUE;  // 1: of this thread alone
    stream->recording = take(sizeof(Graph));
    return SUCCESS;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
    if (!stream || !stream->recording) return INVALID_VALUE;
    *graph = stream->recording;
    stream->recording = NULL;
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long flags) {
    if (flags) return INVALID_VALUE;
    *executable = take(sizeof(Graph));
    **executable = *graph;
    return SUCCESS;
}
int cuGraphDestroy(Graph* graph) { return give(graph); }
int cuGraphExecDestroy(Graph* executable) { return give(executable); }
int cuGraphLaunch(Graph* executable, Stream* stream) {
    if (!executable) return INVALID_HANDLE;
    for (int i = 0; i < executable->count; ++i) enqueue(stream, executable->work[i]);
    return SUCCESS;
}

int cuEventCreate(Event** event, unsigned flags) {
    if (flags) return INVALID_VALUE;  // one that takes the time
    *event = take(sizeof **event);
    return SUCCESS;
}
int cuEventDestroy_v2(Event* event) { return give(event); }
int cuEventRecord(Event* event, Stream* stream) { event->at_ms = clock_ms; return SUCCESS; }
int cuEventSynchronize(Event* event) { return event ? SUCCESS : INVALID_HANDLE; }
int cuEventElapsedTime(float* ms, Event* start, Event* stop) { *ms = stop->at_ms - start->at_ms; return SUCCESS; }
