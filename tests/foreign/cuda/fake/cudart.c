/* CUDA's runtime without a device: device memory is the host's, copies copy, kernels do nothing, graphs replay nothing.

   The card's size, its loss and what is held are the variables fake_…, which tests read and set. What has no meaning
   here is left to the stubs that ../fake.py writes: they answer 0. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "driver_types.h"
#include "note.h"

#define HEADER 256 /* before each block: its size; blocks are aligned to as much */

size_t fake_capacity = 80ull << 30;
atomic_size_t fake_held, fake_most_held;
int fake_lost; /* a cudaError_t: as long as it is set, every call fails with it */

static atomic_long capturing_thread; /* 0: none */

static void noted(const char *call, size_t bytes)
{
    note(capturing_thread != 0, call, bytes, NULL);
}

/* A graph is captured in the mode "global": whatever allocates or waits on any thread meanwhile ends the capture. */
static int refused(void)
{
    return fake_lost ? fake_lost : capturing_thread ? cudaErrorStreamCaptureUnsupported : 0;
}

/* Memory */

static void *zeroed(size_t bytes)
{
    char *block = calloc(1, bytes + 2 * HEADER), *start;
    start = (char *)(((uintptr_t)block + 2 * HEADER - 1) / HEADER * HEADER);
    ((void **)start)[-1] = block;
    ((size_t *)start)[-2] = bytes;
    return start;
}

static void give_back(char *start)
{
    free(((void **)start)[-1]);
}

int cudaMalloc(void **start, size_t bytes)
{
    noted("malloc", bytes);
    if (refused())
        return refused();
    size_t held = atomic_fetch_add(&fake_held, bytes) + bytes;
    if (held > fake_capacity) {
        fake_held -= bytes;
        return cudaErrorMemoryAllocation;
    }
    for (size_t most = fake_most_held; held > most && !atomic_compare_exchange_weak(&fake_most_held, &most, held);)
        ;
    *start = zeroed(bytes);
    return 0;
}

int cudaFree(void *start)
{
    if (!start)
        return 0;
    noted("free", ((size_t *)start)[-2]);
    fake_held -= ((size_t *)start)[-2];
    give_back(start);
    return 0;
}

int cudaMallocFromPoolAsync(void **start, size_t bytes, void *pool, void *stream) { return cudaMalloc(start, bytes); }
int cudaFreeAsync(void *start, void *stream) { return cudaFree(start); }

int cudaHostAlloc(void **start, size_t bytes, unsigned flags)
{
    noted("host_alloc", bytes);
    if (refused())
        return refused();
    *start = zeroed(bytes);
    return 0;
}

int cudaMallocHost(void **start, size_t bytes) { return cudaHostAlloc(start, bytes, 0); }

int cudaFreeHost(void *start)
{
    if (start)
        give_back(start);
    return 0;
}

int cudaMemGetInfo(size_t *unused, size_t *total)
{
    *total = fake_capacity;
    *unused = fake_capacity > fake_held ? fake_capacity - fake_held : 0;
    return fake_lost;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *start)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    return 0;
}

/* Copies */

static const char *const KINDS[] = {"copy_host", "copy_up", "copy_down", "copy_on_device", "copy"};

static void noted_copy(const void *to, const void *from, size_t bytes, int kind)
{
    note(capturing_thread != 0, KINDS[kind], bytes, kind == cudaMemcpyDeviceToHost ? from : to);
}

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind)
{
    noted_copy(to, from, bytes, kind);
    if (refused())
        return refused();
    memmove(to, from, bytes);
    return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream)
{
    noted_copy(to, from, bytes, kind);
    if (fake_lost)
        return fake_lost;
    if (capturing_thread && capturing_thread != syscall(SYS_gettid))
        return cudaErrorStreamCaptureImplicit;
    memmove(to, from, bytes);
    return 0;
}

int cudaMemset(void *start, int value, size_t bytes) { return fake_lost; }
int cudaMemsetAsync(void *start, int value, size_t bytes, void *stream) { return fake_lost; }

/* Kernels */

struct fatbin_wrapper { int magic, version; void *data, *name; };
struct configuration { unsigned grid[3], block[3]; size_t shared; void *stream; };
static _Thread_local struct configuration pushed;

void **__cudaRegisterFatBinary(struct fatbin_wrapper *wrapper) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFunction(void **handle, const char *function, char *name, const char *device_name, ...) {}

int __cudaGetKernel(void **kernel, const void *function)
{
    *kernel = (void *)function;
    return 0;
}

static int launched(void)
{
    noted("launch", 0);
    return fake_lost;
}

int cudaLaunchKernel(const void *function, ...) { return launched(); }
int __cudaLaunchKernel(const void *function, ...) { return launched(); }
int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return launched(); }

typedef struct { unsigned x, y, z; } extent;

unsigned __cudaPushCallConfiguration(extent grid, extent block, size_t shared, void *stream)
{
    pushed = (struct configuration){{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, stream};
    return 0;
}

int __cudaPopCallConfiguration(extent *grid, extent *block, size_t *shared, void **stream)
{
    *grid = (extent){pushed.grid[0], pushed.grid[1], pushed.grid[2]};
    *block = (extent){pushed.block[0], pushed.block[1], pushed.block[2]};
    *shared = pushed.shared;
    *stream = pushed.stream;
    return 0;
}

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, ...)
{
    *blocks = 2;
    return 0;
}

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument)
{
    function(argument);
    return fake_lost;
}

/* Streams, events and graphs: handles that are never looked into. A call that takes one and waits is a synchronisation. */

static int handle(void **made)
{
    static atomic_uintptr_t last = 0x100;
    *made = (void *)(last += 16);
    return fake_lost;
}

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
int cudaStreamSynchronize(void *stream) { return refused(); }
int cudaDeviceSynchronize(void) { return refused(); }
int cudaGetLastError(void) { return fake_lost; }
int cudaPeekAtLastError(void) { return fake_lost; }

int cudaStreamBeginCapture(void *stream, int mode)
{
    noted("capture", 0);
    capturing_thread = syscall(SYS_gettid);
    return fake_lost;
}

int cudaStreamEndCapture(void *stream, void **graph)
{
    capturing_thread = 0;
    return handle(graph);
}

int cudaStreamIsCapturing(void *stream, int *status)
{
    *status = capturing_thread != 0;
    return 0;
}

int cudaGraphInstantiate(void **executable, void *graph, unsigned long flags) { return handle(executable); }

int cudaGraphLaunch(void *executable, void *stream)
{
    noted("replay", 0);
    return fake_lost;
}

/* The device: one of the kind of an H100 */

int cudaGetDeviceCount(int *count)
{
    *count = 1;
    return 0;
}

int cudaGetDevice(int *device)
{
    *device = 0;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    *properties = (struct cudaDeviceProp){
        .name = "Fake H100", .totalGlobalMem = fake_capacity, .major = 9, .minor = 0, .multiProcessorCount = 132,
        .warpSize = 32, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .l2CacheSize = 50 << 20,
        .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .sharedMemPerBlock = 49152, .sharedMemPerMultiprocessor = 233472,
        .sharedMemPerBlockOptin = 232448,
    };
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    *value = attribute == cudaDevAttrComputeCapabilityMajor        ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor      ? 0
             : attribute == cudaDevAttrMultiProcessorCount         ? 132
             : attribute == cudaDevAttrMaxSharedMemoryPerBlock     ? 49152
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                                   : 1;
    return 0;
}

int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long flags, int *status)
{
    *function = NULL;
    if (status)
        *status = 1; /* not found */
    return 0;
}

const char *cudaGetErrorString(int error) { return "an error of the fake"; }
const char *cudaGetErrorName(int error) { return "fakeError"; }
