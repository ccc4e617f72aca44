// Do with one plugin of a library what TensorRT does with it, without TensorRT: make it, serialise it, make it again,
// attach it, change its shapes, enqueue it. Arguments: library, node, type of the first input, then "name=value" for
// attributes (a float has a point) and "d0,d1,…:type" for inputs; the input arrays are at 1 MiB, 2 MiB …, the stream is 7.
// On stdout: number of outputs, their types, the fields that are serialised.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Finder : ILoggerFinder {
    struct Logger : ILogger {
        void log(Severity, const char* message) noexcept override { std::fprintf(stderr, "%s\n", message); }
    } logger;
    ILogger* findLogger() override { return &logger; }
};

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    static Finder finder;
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) fail(dlerror());
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    int32_t found = 0;
    auto* const* creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(found);
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < found; ++i) {
        auto* each = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (!std::strcmp(each->getPluginName(), arguments[2])) creator = each;
    }
    if (!creator) fail("no such node");

    std::vector<float> floats(count);
    std::vector<int32_t> integers(count);
    std::vector<PluginField> fields;
    std::vector<PluginTensorDesc> inputs;
    std::vector<DataType> types;
    std::vector<std::string> names(count);
    for (int i = 3; i < count; ++i) {
        std::string text = arguments[i];
        if (const size_t equals = text.find('='); equals != std::string::npos) {
            names[i] = text.substr(0, equals);
            const std::string value = text.substr(equals + 1);
            const bool is_float = value.find('.') != std::string::npos || value.find('e') != std::string::npos;
            floats[i] = std::strtof(value.c_str(), nullptr);
            integers[i] = std::atoi(value.c_str());
            fields.emplace_back(names[i].c_str(), is_float ? static_cast<void*>(&floats[i]) : &integers[i],
                                is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
        } else {
            PluginTensorDesc desc{};
            const size_t colon = text.find(':');
            desc.type = static_cast<DataType>(std::atoi(text.c_str() + colon + 1));
            desc.format = TensorFormat::kLINEAR;
            for (const char* at = text.c_str(); at && at < text.c_str() + colon;) {
                desc.dims.d[desc.dims.nbDims++] = std::atoll(at);
                at = std::strchr(at, ',');
                if (at) ++at;
            }
            inputs.push_back(desc);
            types.push_back(desc.type);
        }
    }

    const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
    IPluginV3* first = creator->createPlugin("node", &given, TensorRTPhase::kBUILD);
    if (!first) fail("createPlugin");
    auto* stored = static_cast<IPluginV3OneRuntime*>(first->getCapabilityInterface(PluginCapabilityType::kRUNTIME))->getFieldsToSerialize();
    if (!stored) fail("getFieldsToSerialize");
    IPluginV3* again = creator->createPlugin("node", stored, TensorRTPhase::kRUNTIME);
    if (!again) fail("createPlugin from what was serialised");
    IPluginV3* copy = again->clone();
    auto* build = static_cast<IPluginV3OneBuild*>(copy->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const int32_t outputs = build->getNbOutputs();
    std::vector<DataType> made(outputs);
    if (build->getOutputDataTypes(made.data(), outputs, types.data(), types.size())) fail("getOutputDataTypes");
    std::printf("%d", outputs);
    for (DataType type : made) std::printf(" %d", static_cast<int>(type));
    for (int32_t i = 0; i < stored->nbFields; ++i) {
        int32_t bits;
        std::memcpy(&bits, stored->fields[i].data, sizeof bits);
        std::printf(" %s=%d", stored->fields[i].name, bits);
    }
    std::printf("\n");

    std::vector<DynamicPluginTensorDesc> every(inputs.size() + outputs);
    for (size_t i = 0; i < every.size(); ++i) {
        every[i].desc.type = i < inputs.size() ? inputs[i].type : made[i - inputs.size()];
        every[i].desc.format = TensorFormat::kLINEAR;
    }
    for (size_t i = 0; i < every.size(); ++i) {
        if (!build->supportsFormatCombination(i, every.data(), inputs.size(), outputs)) fail("supportsFormatCombination");
        every[i].desc.format = TensorFormat::kCHW4;
        if (build->supportsFormatCombination(i, every.data(), inputs.size(), outputs)) fail("CHW4 was taken");
        every[i].desc.format = TensorFormat::kLINEAR;
    }

    // The context that an engine would have made current.
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) fail(dlerror());
    static int context;
    reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"))(&context);
    auto* attached = runtime->attachToContext(nullptr);
    auto* runs = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::vector<const void*> sources;
    std::vector<void*> targets;
    for (size_t i = 0; i < inputs.size(); ++i) sources.push_back(reinterpret_cast<void*>((i + 1) << 20));
    for (int32_t i = 0; i < outputs; ++i) targets.push_back(reinterpret_cast<void*>((inputs.size() + i + 1) << 20));
    std::vector<PluginTensorDesc> written(outputs);
    if (runs->onShapeChange(inputs.data(), inputs.size(), written.data(), outputs)) fail("onShapeChange");
    if (runs->enqueue(inputs.data(), written.data(), sources.data(), targets.data(), nullptr, reinterpret_cast<cudaStream_t>(7))) {
        fail("enqueue");
    }
    delete attached;
    delete copy;
    delete again;
    delete first;
    return 0;
}
