// Lists the library's kernels, and on a GPU runs two operations of it against stored results.
//
// The results (expected.h, written by make_expected.py) are those of the Python operations' reference in float64; the
// inputs are made here and there by the same exact formulas. Without a GPU the list is all, and the exit status is 0.
// A real program would have its memory and streams from the CUDA runtime or from torch; here the driver is opened by
// hand, so that the example builds without CUDA.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "coars_kernels.h"
#include "expected.h"

namespace {

using Address = std::uint64_t;  // CUdeviceptr

[[noreturn]] void stop(const std::string &problem) {
    std::fprintf(stderr, "example: %s\n", problem.c_str());
    std::exit(1);
}

struct Driver {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);

    template <typename... Arguments>
    int call(const char *name, Arguments... arguments) const {
        using Function = int (*)(Arguments...);
        void *symbol = dlsym(library, name);
        if (!symbol) stop(std::string(name) + " is not in libcuda.so.1");
        return reinterpret_cast<Function>(symbol)(arguments...);
    }
    template <typename... Arguments>
    void must(const char *name, Arguments... arguments) const {
        int error = call(name, arguments...);
        if (error) stop(std::string(name) + " returned " + std::to_string(error));
    }
};

const Driver driver;

// An array on the device. Freed with the process.
template <typename T>
struct Array {
    Address address = 0;
    std::size_t size;

    explicit Array(std::size_t size) : size(size) {
        driver.must("cuMemAlloc_v2", &address, size * sizeof(T));
        driver.must("cuMemsetD8_v2", address, static_cast<unsigned char>(0xFF), size * sizeof(T));  // NaN
    }
    explicit Array(const std::vector<T> &values) : Array(values.size()) {
        driver.must("cuMemcpyHtoD_v2", address, static_cast<const void *>(values.data()), size * sizeof(T));
    }
    std::vector<T> read() const {
        std::vector<T> values(size);
        driver.must("cuMemcpyDtoH_v2", static_cast<void *>(values.data()), address, size * sizeof(T));
        return values;
    }
};

// Launch by the names of the arguments, whose order the library knows.
void launch(const char *name, int arch, unsigned grid, std::map<std::string, void *> given) {
    const coars_kernel_info *info = coars_kernels_find(name, arch);
    if (!info) {
        std::printf("example: the library has no %s for sm_%d; build with -DCOARS_ARCHS=%d\n", name, arch, arch);
        std::exit(77);
    }
    std::vector<void *> arguments;
    std::string text = info->arguments;
    for (std::size_t start = 0; start < text.size();) {
        std::size_t end = std::min(text.find(", ", start), text.size());
        std::string argument = text.substr(start, text.find(' ', start) - start);
        if (!given.count(argument)) stop(std::string(name) + " needs " + argument);
        arguments.push_back(given[argument]);
        start = end + 2;
    }
    coars_kernel *kernel = nullptr;
    if (coars_kernels_load(info, &kernel) ||
        coars_kernels_launch(kernel, grid, 1, 1, arguments.data(), static_cast<int>(arguments.size()), nullptr))
        stop(coars_kernels_error());
    driver.must("cuCtxSynchronize");
    if (coars_kernels_unload(kernel)) stop(coars_kernels_error());
}

int differences = 0;

template <typename T>
void compare(const char *what, const std::vector<T> &found, const double *expected, std::size_t size,
             double tolerance) {
    double worst = 0;
    for (std::size_t i = 0; i < size; i++) {
        double error = std::abs(found[i] - expected[i]) / (1 + std::abs(expected[i]));
        worst = error <= worst ? worst : error;
        if (std::isnan(error)) break;  // worst is NaN now, and fits nothing
    }
    bool fits = worst <= tolerance;
    std::printf("%-28s largest error %.2e, %s\n", what, worst, fits ? "ok" : "WRONG");
    differences += !fits;
}

// A number in [-limit, limit), exact in float: the same in make_expected.py.
float made(std::int64_t i, std::int64_t factor, float limit) {
    return static_cast<float>((i * factor) % 1021 - 510) / 512.0f * limit;
}

std::vector<float> made(std::size_t size, std::int64_t factor, float limit, float offset) {
    std::vector<float> values(size);
    for (std::size_t i = 0; i < size; i++) values[i] = made(static_cast<std::int64_t>(i), factor, limit) + offset;
    return values;
}

void head_rows(int arch) {
    std::vector<float> logits(HEAD_ROWS * HEAD_STRIDE);
    std::vector<std::int64_t> target(HEAD_ROWS);
    for (int row = 0; row < HEAD_ROWS; row++) {
        target[row] = (row * 1201 + 5) % HEAD_VOCAB;
        for (int token = 0; token < HEAD_VOCAB; token++)
            logits[row * HEAD_STRIDE + token] = made(std::int64_t{row} * HEAD_VOCAB + token, 389, 8.0f);
    }
    Array<float> logits_d(logits), mass(logits.size()), logp(HEAD_ROWS), share(HEAD_ROWS), inverse(HEAD_ROWS);
    Array<std::int64_t> target_d(target);
    float temperature = 0.75f;
    int vocab_size = HEAD_VOCAB, stride = HEAD_STRIDE;
    launch("head_rows_fp32", arch, HEAD_ROWS,
           {{"logits", &logits_d.address}, {"target", &target_d.address}, {"temperature", &temperature},
            {"mass", &mass.address}, {"logp", &logp.address}, {"others_share", &share.address},
            {"inverse", &inverse.address}, {"vocab_size", &vocab_size}, {"logits_stride", &stride},
            {"mass_stride", &stride}});
    compare("head_rows logp", logp.read(), EXPECTED_LOGP, HEAD_ROWS, 1e-5);
    compare("head_rows others_share", share.read(), EXPECTED_SHARE, HEAD_ROWS, 1e-5);
    std::vector<float> mass_h = mass.read(), inverse_h = inverse.read();
    std::vector<double> moments(HEAD_ROWS);
    for (int row = 0; row < HEAD_ROWS; row++)
        for (int token = 0; token < HEAD_VOCAB; token++)
            moments[row] += double{mass_h[row * HEAD_STRIDE + token]} * inverse_h[row] * (token % 7);
    compare("head_rows masses", moments, EXPECTED_MOMENT, HEAD_ROWS, 1e-5);
}

std::vector<double> column_sums(const std::vector<double> &rows, std::size_t columns) {
    std::vector<double> sums(columns);
    for (std::size_t i = 0; i < rows.size(); i++) sums[i % columns] += rows[i];
    return sums;
}

void credit(int arch) {
    const std::vector<std::int32_t> offsets(CREDIT_OFFSETS, CREDIT_OFFSETS + CREDIT_TURNS + 1);
    const std::vector<float> turn_weight(CREDIT_WEIGHT, CREDIT_WEIGHT + CREDIT_TURNS);
    const std::vector<std::int8_t> agent(CREDIT_AGENT, CREDIT_AGENT + CREDIT_TURNS);
    const std::size_t tokens = CREDIT_TOKENS;
    Array<float> logp(made(tokens, 37, 1.5f, -2.0f)), teacher(made(tokens, 53, 1.5f, -2.0f));
    Array<float> anchor(made(tokens, 41, 1.5f, -2.0f)), sampler(made(tokens, 43, 1.5f, -2.0f));
    Array<float> reference(made(tokens, 47, 1.5f, -2.0f)), reward(made(CREDIT_TURNS, 331, 1.0f, 0.0f));
    Array<float> weight(turn_weight), grad(tokens), loss(1), metrics(CREDIT_METRICS);
    Array<std::int32_t> offsets_d(offsets);
    Array<std::int8_t> agent_d(agent);
    Array<double> center_rows(CREDIT_TURNS * 4), rows(CREDIT_TURNS * 16);
    float default_weight = 1.0f / CREDIT_TURNS, credit_weight = 0.25f, credit_clip = 1.0f, low = 0.75f, high = 1.25f;
    float dual_clip = 3.0f, importance_cap = 2.0f, kl_weight = 0.0625f;

    launch("credit_center", arch, CREDIT_TURNS,
           {{"sums_ptr", &center_rows.address}, {"logp_ptr", &logp.address}, {"teacher_ptr", &teacher.address},
            {"offsets_ptr", &offsets_d.address}, {"weight_ptr", &weight.address}, {"agent_ptr", &agent_d.address},
            {"default_weight", &default_weight}, {"credit_clip", &credit_clip}});
    Array<double> center(column_sums(center_rows.read(), 4));
    launch("credit_clipped", arch, CREDIT_TURNS,
           {{"grad_ptr", &grad.address}, {"sums_ptr", &rows.address}, {"logp_ptr", &logp.address},
            {"teacher_ptr", &teacher.address}, {"anchor_ptr", &anchor.address}, {"sampler_ptr", &sampler.address},
            {"reference_ptr", &reference.address}, {"reward_ptr", &reward.address},
            {"offsets_ptr", &offsets_d.address}, {"weight_ptr", &weight.address}, {"agent_ptr", &agent_d.address},
            {"center_ptr", &center.address}, {"default_weight", &default_weight}, {"credit_weight", &credit_weight},
            {"credit_clip", &credit_clip}, {"low", &low}, {"high", &high}, {"dual_clip", &dual_clip},
            {"importance_cap", &importance_cap}, {"kl_weight", &kl_weight}});
    Array<double> sums(column_sums(rows.read(), 16));
    launch("credit_metrics", arch, 1,
           {{"loss_ptr", &loss.address}, {"metrics_ptr", &metrics.address}, {"sums_ptr", &sums.address}});
    compare("credit gradient", grad.read(), EXPECTED_GRADIENT, tokens, 1e-5);
    compare("credit loss", loss.read(), &EXPECTED_LOSS, 1, 1e-5);
    compare("credit metrics", metrics.read(), EXPECTED_METRICS, CREDIT_METRICS, 1e-5);
}

}  // namespace

int main() {
    for (int i = 0; i < coars_kernels_count(); i++) {
        const coars_kernel_info *info = coars_kernels_get(i);
        std::printf("%-30s sm_%d %2d warps %3d registers %6d shared bytes\n", info->name, info->arch, info->num_warps,
                    info->registers, info->shared_bytes);
    }
    std::printf("coars_kernels %s, %d kernels\n", coars_kernels_version(), coars_kernels_count());
    int count = 0;
    if (!driver.library || driver.call("cuInit", 0u) || driver.call("cuDeviceGetCount", &count) || !count) {
        std::printf("no GPU here: the kernels were listed, none was run\n");
        return 0;
    }
    int device = 0, major = 0, minor = 0;
    void *context = nullptr;
    driver.must("cuDeviceGet", &device, 0);
    driver.must("cuDeviceGetAttribute", &major, 75, device);
    driver.must("cuDeviceGetAttribute", &minor, 76, device);
    driver.must("cuDevicePrimaryCtxRetain", &context, device);
    driver.must("cuCtxSetCurrent", context);
    head_rows(10 * major + minor);
    credit(10 * major + minor);
    std::printf("%s on sm_%d%d\n", differences ? "results are WRONG" : "all results agree", major, minor);
    return differences ? 1 : 0;
}
