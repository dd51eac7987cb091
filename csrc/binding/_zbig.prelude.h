#include "zbig.h"
