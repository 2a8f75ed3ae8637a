/*
 * A narrow door to libjpeg-turbo's libjpeg API. Every function that can meet a
 * libjpeg error calls setjmp itself, so that longjmp never crosses a Rust frame.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

enum { OK = 0, CORRUPT = 1, TRUNCATED = 2, UNSUPPORTED = 3, TOO_LARGE = 4 };

typedef struct {
  struct jpeg_decompress_struct cinfo;
  struct jpeg_error_mgr errors;
  struct jpeg_source_mgr source;
  struct jpeg_progress_mgr progress;
  jmp_buf jump;
  int max_scans;
  int lenient; /* a cut file is decoded as far as it goes */
  int ended;   /* and the end marker that it lacks has been supplied */
  int blank;   /* and it was cut where nothing can be decoded */
  JSAMPROW spare; /* a row to read what is skipped into, where nothing can be left out */
  int kind;
  char message[JMSG_LENGTH_MAX];
} pk_jpeg;

typedef struct {
  uint32_t width, height;
  int32_t components;
  int32_t out_components; /* 3 is RGB, 4 is CMYK as stored */
} pk_jpeg_info;

static void fail(pk_jpeg *p, int kind, const char *message) {
  p->kind = kind;
  snprintf(p->message, sizeof p->message, "%s", message);
  longjmp(p->jump, 1);
}

static void error_exit(j_common_ptr cinfo) {
  pk_jpeg *p = (pk_jpeg *)cinfo->client_data;
  (*cinfo->err->format_message)(cinfo, p->message);
  switch (cinfo->err->msg_code) {
  case JERR_OUT_OF_MEMORY:
  case JERR_NO_BACKING_STORE:
  case JERR_IMAGE_TOO_BIG:
  case JERR_WIDTH_OVERFLOW:
    p->kind = TOO_LARGE;
    break;
  case JERR_BAD_PRECISION:
  case JERR_CONVERSION_NOTIMPL:
  case JERR_SOF_UNSUPPORTED:
  case JERR_ARITH_NOTIMPL:
  case JERR_NOT_COMPILED:
  case JERR_NOTIMPL:
  case JERR_CCIR601_NOTIMPL:
  case JERR_FRACT_SAMPLE_NOTIMPL:
    p->kind = UNSUPPORTED;
    break;
  default:
    p->kind = CORRUPT;
  }
  longjmp(p->jump, 1);
}

/* Warnings are not errors, as in Pillow. */
static void emit_message(j_common_ptr cinfo, int level) {
  if (level < 0)
    cinfo->err->num_warnings++;
}

static void nothing(j_decompress_ptr cinfo) { (void)cinfo; }

/* The whole file is in memory, so asking for more means that it was cut. To a lenient reader, as
 * to Pillow's, an end marker follows, and then the library waits in vain. */
static boolean fill_input_buffer(j_decompress_ptr cinfo) {
  static const JOCTET end[2] = {0xff, JPEG_EOI};
  pk_jpeg *p = (pk_jpeg *)cinfo->client_data;
  if (!p->lenient)
    fail(p, TRUNCATED, "the JPEG data end too early");
  if (p->ended)
    return FALSE;
  p->ended = 1;
  cinfo->src->next_input_byte = end;
  cinfo->src->bytes_in_buffer = sizeof end;
  return TRUE;
}

static void skip_input_data(j_decompress_ptr cinfo, long count) {
  if (count <= 0)
    return;
  if ((size_t)count > cinfo->src->bytes_in_buffer) {
    fill_input_buffer(cinfo);
    /* The segment that is passed swallows the end marker too. */
    count = (long)cinfo->src->bytes_in_buffer;
  }
  cinfo->src->next_input_byte += count;
  cinfo->src->bytes_in_buffer -= (size_t)count;
}

/* Each scan of a progressive file walks over the whole picture again. */
static void progress_monitor(j_common_ptr cinfo) {
  pk_jpeg *p = (pk_jpeg *)cinfo->client_data;
  if (cinfo->is_decompressor && p->cinfo.input_scan_number > p->max_scans)
    fail(p, CORRUPT, "more scans than any encoder writes");
}

void pk_jpeg_close(pk_jpeg *p) {
  if (p) {
    jpeg_destroy_decompress(&p->cinfo);
    free(p);
  }
}

const char *pk_jpeg_message(const pk_jpeg *p) { return p->message; }

/* Reads the header. *out is NULL only when memory ran out. */
int pk_jpeg_open(const uint8_t *data, size_t length, int max_scans, int lenient,
                 pk_jpeg **out, pk_jpeg_info *info) {
  pk_jpeg *p = calloc(1, sizeof *p);
  *out = p;
  if (!p)
    return TOO_LARGE;
  p->max_scans = max_scans;
  p->lenient = lenient;
  p->cinfo.err = jpeg_std_error(&p->errors);
  p->errors.error_exit = error_exit;
  p->errors.emit_message = emit_message;
  p->cinfo.client_data = p;
  if (setjmp(p->jump))
    return p->kind;
  jpeg_create_decompress(&p->cinfo);
  p->progress.progress_monitor = progress_monitor;
  p->cinfo.progress = &p->progress;
  p->source.init_source = nothing;
  p->source.fill_input_buffer = fill_input_buffer;
  p->source.skip_input_data = skip_input_data;
  p->source.resync_to_restart = jpeg_resync_to_restart;
  p->source.term_source = nothing;
  p->source.next_input_byte = data;
  p->source.bytes_in_buffer = length;
  p->cinfo.src = &p->source;
  int header;
  while ((header = jpeg_read_header(&p->cinfo, FALSE)) == JPEG_HEADER_TABLES_ONLY) {
  }
  if (header != JPEG_HEADER_OK)
    fail(p, TRUNCATED, "the JPEG data end in the header");
  if (p->cinfo.data_precision != 8) {
    snprintf(p->message, sizeof p->message, "a JPEG of %d bits per sample",
             p->cinfo.data_precision);
    return UNSUPPORTED;
  }
  switch (p->cinfo.num_components) {
  case 1:
  case 3:
    p->cinfo.out_color_space = JCS_EXT_RGB;
    info->out_components = 3;
    break;
  case 4:
    p->cinfo.out_color_space = JCS_CMYK;
    info->out_components = 4;
    break;
  default:
    snprintf(p->message, sizeof p->message, "a JPEG of %d components",
             p->cinfo.num_components);
    return UNSUPPORTED;
  }
  info->width = p->cinfo.image_width;
  info->height = p->cinfo.image_height;
  info->components = p->cinfo.num_components;
  return OK;
}

/* Whether a cut file has led to this error, so that the rest of the picture stays blank. */
static int is_cut(pk_jpeg *p) {
  if (p->ended && (p->kind == CORRUPT || p->kind == TRUNCATED))
    p->blank = 1;
  return p->blank;
}

/* Pillow leaves its picture at zero, which of stored (inverted) CMYK is 255. */
static void fill_blank(const pk_jpeg *p, uint8_t *out, size_t bytes) {
  memset(out, p->cinfo.out_color_space == JCS_CMYK ? 255 : 0, bytes);
}

/* Whether a progressive file lacks scans, so that the library guesses coefficients from the means
 * of the blocks around. At the edges of what it decodes the guesses would be others. */
static int is_smoothed(const struct jpeg_decompress_struct *cinfo) {
  if (!cinfo->progressive_mode || !cinfo->coef_bits)
    return 0;
  for (int component = 0; component < cinfo->num_components; component++)
    for (int i = 1; i < 10; i++)
      if (cinfo->coef_bits[component][i] != 0)
        return 1;
  return 0;
}

/* Starts the output at 1/denominator of the size. With *width > 0 only the columns
 * from *x on are decoded; *x and *width come back as libjpeg aligned them. */
int pk_jpeg_start(pk_jpeg *p, int denominator, uint32_t *x, uint32_t *width,
                  uint32_t *out_width, uint32_t *out_height) {
  if (setjmp(p->jump))
    return is_cut(p) ? OK : p->kind;
  p->cinfo.scale_num = 1;
  p->cinfo.scale_denom = (unsigned)denominator;
  jpeg_calc_output_dimensions(&p->cinfo);
  *out_width = p->cinfo.output_width;
  *out_height = p->cinfo.output_height;
  p->blank = !jpeg_start_decompress(&p->cinfo);
  if (is_smoothed(&p->cinfo)) {
    size_t bytes = (size_t)p->cinfo.output_width * p->cinfo.output_components;
    p->spare = p->cinfo.mem->alloc_large((j_common_ptr)&p->cinfo, JPOOL_IMAGE, bytes);
    *x = 0;
    *width = p->cinfo.output_width;
  } else if (*width > 0 && !p->blank) {
    JDIMENSION offset = *x, columns = *width;
    jpeg_crop_scanline(&p->cinfo, &offset, &columns);
    *x = offset;
    *width = columns;
  }
  return OK;
}

int pk_jpeg_skip(pk_jpeg *p, uint32_t rows) {
  if (p->blank)
    return OK;
  if (setjmp(p->jump))
    return is_cut(p) ? OK : p->kind;
  while (rows > 0) {
    JDIMENSION done = p->spare ? jpeg_read_scanlines(&p->cinfo, &p->spare, 1)
                               : jpeg_skip_scanlines(&p->cinfo, rows);
    if (done == 0)
      fail(p, CORRUPT, "the JPEG has fewer rows than its header says");
    rows -= done < rows ? done : rows;
  }
  return OK;
}

int pk_jpeg_read(pk_jpeg *p, uint8_t *out, size_t stride, uint32_t rows) {
  /* Volatile, as they are read after longjmp has returned here. */
  uint8_t *volatile next = out;
  volatile uint32_t left = rows;
  if (p->blank || setjmp(p->jump)) {
    if (!is_cut(p))
      return p->kind;
    fill_blank(p, next, left * stride);
    return OK;
  }
  while (left > 0) {
    JSAMPROW lines[16];
    uint32_t ask = left < 16 ? left : 16;
    for (uint32_t i = 0; i < ask; i++)
      lines[i] = next + i * stride;
    JDIMENSION done = jpeg_read_scanlines(&p->cinfo, lines, ask);
    if (done == 0)
      fail(p, CORRUPT, "the JPEG has fewer rows than its header says");
    next += done * stride;
    left -= done;
  }
  return OK;
}
