// The loops of rows.h in plain C++, where neither AVX2 nor AVX-512 is found.
#include "attention/rows_common.h"

namespace sphinx::attention {

const Rows& rows_plain() {
  static const Rows rows = make_rows<Lane>();
  return rows;
}

}  // namespace sphinx::attention
