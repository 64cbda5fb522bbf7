/* What functions of the C core return that can fail: 0 or a negative value, which Cython turns into an exception. */
#ifndef SMALLTHINKER_STATUS_H
#define SMALLTHINKER_STATUS_H

typedef enum st_status {
    ST_OK = 0,
    ST_ERR_IO = -1,         /* a read failed or came back short */
    ST_ERR_ARGUMENT = -2,   /* a value is outside its contract */
    ST_ERR_UNSUPPORTED = -3 /* a value cannot be put into the type asked for */
} st_status;

#endif
