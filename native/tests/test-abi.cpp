// test-abi LIBRARY OTHER: the backend registers with the ggml that it was built for, and OTHER, built for another
// version, refuses with a reason.
#include "ggml-prosparse.h"

#include "check.h"

#include <dlfcn.h>

#include <cstring>
#include <string>

namespace {

template <typename F>
F * find(void * library, const char * name) {
    F * function = (F *) dlsym(library, name);
    CHECK(function != nullptr, "%s", name);
    return function;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: test-abi LIBRARY OTHER\n");
        return 2;
    }
    void * library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    void * other   = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr && other != nullptr, "%s", dlerror());
    if (failures() > 0) {
        return report("test-abi");
    }

    CHECK(find<int()>(library, "prosparse_api_version")() == PROSPARSE_API_VERSION, "version of the API");
    CHECK(find<const char *()>(library, "prosparse_abi_error")() == nullptr, "the right ggml is refused");
    CHECK(strcmp(find<const char *()>(library, "prosparse_built_for_ggml")(), ggml_version()) == 0, "%s",
          ggml_version());
    ggml_backend_reg_t reg = ggml_backend_load(argv[1]);
    CHECK(reg != nullptr && ggml_backend_reg_dev_count(reg) == 1, "not loaded");
    ggml_backend_dev_t device = ggml_backend_dev_by_name("ProSparse");
    CHECK(device != nullptr && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL, "no device");
    CHECK(device == nullptr || ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(device)),
          "its default buffer type must be the CPU's, or it would capture every model");

    const char * error = find<const char *()>(other, "prosparse_abi_error")();
    CHECK(error != nullptr && strstr(error, "0.0.1") != nullptr && strstr(error, ggml_version()) != nullptr, "%s",
          error != nullptr ? error : "another ggml is accepted");
    CHECK(find<ggml_backend_reg_t()>(other, "ggml_backend_init")() == nullptr, "another ggml is accepted");
    CHECK(ggml_backend_load(argv[2]) == nullptr, "another ggml is loaded");
    return report("test-abi");
}
